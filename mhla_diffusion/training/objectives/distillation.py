"""Distillation: an objective, and a frozen teacher that is asked about the same noisy samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn

from ...backbones.teacher import LayerCall, attention_layers, place, recording
from ..sharding import gather_as_stored
from .objective import Denoiser, DistillationConfig, Objective, mean_flat

logger = logging.getLogger(__name__)


class Distillation(Objective):
    """Loss on data + error against the teacher's prediction + error of self-attention outputs, fading.

    ``L = data L_objective(p, target) + prediction L_objective(p, p_T) + attention (1 - step / fade_steps)
    mean_l |a_l - a_l,T|^2 / |a_l,T|^2`` over every n-th layer l. The teacher sees the same noisy samples,
    times and conditions, in no_grad and in its own dtype; it is no part of what is trained, averaged or
    saved. Where its guidance is distilled there is no loss on data, which has none.

    Args:
        objective: of the student, and of the teacher.
        teacher: as :func:`mhla_diffusion.backbones.teacher.as_teacher` gives it.
        config: see :class:`DistillationConfig`.
        name: of the teacher, for the model card.
    """

    def __init__(
        self, objective: Objective, teacher: Any, config: DistillationConfig, *, name: str = "a teacher"
    ) -> None:
        self.objective, self.teacher, self.config, self.name = objective, teacher, config, name
        self.predicts_variance = objective.predicts_variance
        # Arguments of the model without their conditions, for guidance.
        self.unconditional: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None

    def loss_at(
        self,
        model: Denoiser,
        samples: Tensor,
        conditioning: Mapping[str, Any],
        *,
        times: Tensor,
        noise: Tensor,
    ) -> Tensor:
        noisy = self.noisy(samples, times, noise)
        weight = self.config.attention * max(0.0, 1 - self.step / self.config.fade_steps)
        names = [self._layers(net) if weight else [] for net in (model, self.teacher)]
        assert isinstance(model, nn.Module)
        with recording(model, names[0]) as ours, recording(self.teacher, names[1]) as theirs:
            prediction = self.predict(model, noisy, times, conditioning)
            target = self._ask(noisy, times, conditioning)
        loss = self._prediction_error(prediction, target, times)
        if self.config.guidance_scale == 1:  # data would pull towards a prediction without guidance
            loss = loss + self.config.data * self.loss_of(prediction, samples, times=times, noise=noise)
        errors = [
            _relative_error(ours[name], theirs[its]) for name, its in zip(names[0], names[1], strict=True)
        ]
        if not errors:
            return loss
        # Layers over frames or over time alone have several rows of each sample, behind each other.
        of_samples = [error.unflatten(0, (len(loss), -1)).mean(1) for error in errors]
        return loss + weight * torch.stack(of_samples).mean(0)

    def _prediction_error(self, prediction: Tensor, target: Tensor, times: Tensor) -> Tensor:
        if not self.predicts_variance:
            return self.config.prediction * self.difference(prediction, target, times=times)
        (mean, variance), (its_mean, its_variance) = (x.chunk(2, dim=1) for x in (prediction, target))
        error = self.config.prediction * self.difference(mean, its_mean, times=times)
        return error + self.config.variance * mean_flat((variance - its_variance) ** 2)

    @torch.no_grad()
    def _ask(self, noisy: Tensor, times: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """The teacher's prediction; guided, if the config says so, by one that layers are not noted of."""
        scale, guided = self.config.guidance_scale, None
        if scale > 1:
            assert self.unconditional is not None
            guided = self._predict(noisy, times, self.unconditional(conditioning))
        target = self._predict(noisy, times, conditioning)  # last: its layers are noted
        if guided is None:
            return target
        channels = target.shape[1] // (2 if self.predicts_variance else 1)
        free, held = target[:, :channels], target[:, channels:]
        return torch.cat((guided[:, :channels] + scale * (free - guided[:, :channels]), held), 1)

    def _predict(self, noisy: Tensor, times: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        own = place(self.teacher, {**conditioning, "hidden_states": noisy})
        return self.predict(self.teacher, own.pop("hidden_states"), times, own)

    def _layers(self, model: Any) -> list[str]:
        found = attention_layers(model)
        return [name for name, layer in found.items() if layer.layer_number % self.config.every == 0]

    def check(self, model: Any) -> None:
        """Check that a student, not yet wrapped or given adapters, has the teacher's shape.

        Raises:
            ValueError: naming a weight that differs.
        """
        ours, theirs = _shapes(model), _shapes(self.teacher)
        if differing := sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name)):
            name = differing[0]
            raise ValueError(
                f"the student and the teacher {self.name} differ in {len(differing)} weights, first {name}: "
                f"{ours.get(name, 'none')} and {theirs.get(name, 'none')}; a student is made of its teacher, "
                "by mhla choose or mhla convert"
            )

    def prepare(self, model: Any, accelerator: Accelerator) -> None:
        if accelerator.distributed_type == DistributedType.FSDP:
            # Sharded as the student is, but no part of its checkpoints.
            if accelerator.is_fsdp2:  # whose prepare wants an optimizer beside every model
                gather_as_stored(accelerator)
                self.teacher = fsdp2_prepare_model(accelerator, self.teacher)
            else:
                self.teacher = accelerator.prepare_model(self.teacher)
                accelerator._models.remove(self.teacher)
            return
        self.teacher.to(accelerator.device)
        shared = share_frozen(self.teacher, accelerator.unwrap_model(model))
        logger.info("teacher %s; %.1f MB of it are shared with the student", self.name, shared / 1e6)

    def facts(self) -> dict[str, str]:
        scale = self.config.guidance_scale
        return {
            "objective": f"{type(self.objective).__name__}, distilled",
            "teacher": self.name,
            "guidance": "kept: sample with it"
            if scale == 1
            else f"distilled at {scale:g}: sample without it",
        }

    def timestep(self, times: Tensor) -> Tensor:
        return self.objective.timestep(times)

    def time_at(self, fractions: Tensor) -> Tensor:
        return self.objective.time_at(fractions)

    def _draw_time(self, generator: torch.Generator) -> Tensor:
        return self.objective.draw_time(generator)

    def noisy(self, samples: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        return self.objective.noisy(samples, times, noise)

    def loss_of(self, prediction: Tensor, samples: Tensor, *, times: Tensor, noise: Tensor) -> Tensor:
        return self.objective.loss_of(prediction, samples, times=times, noise=noise)

    def difference(self, prediction: Tensor, other: Tensor, *, times: Tensor) -> Tensor:
        return self.objective.difference(prediction, other, times=times)

    def scheduler(self) -> Any:
        return self.objective.scheduler()


def share_frozen(teacher: nn.Module, student: nn.Module) -> int:
    """Let a teacher use the memory of the student's frozen weights that equal its own; return its bytes."""
    frozen = {
        name.replace(".base_layer.", "."): weight
        for name, weight in student.named_parameters()
        if not weight.requires_grad
    }
    shared = 0
    for name, weight in teacher.named_parameters():
        its = frozen.get(name)
        if its is not None and its.dtype == weight.dtype and torch.equal(its, weight):
            weight.data = its.data
            shared += weight.numel() * weight.element_size()
    return shared


def _relative_error(ours: LayerCall, theirs: LayerCall) -> Tensor:
    """``|a - a_T|^2 / |a_T|^2`` of each row of a layer's batch."""
    wanted = theirs.outputs.float()
    return mean_flat((ours.outputs.float() - wanted) ** 2) / mean_flat(wanted**2).clamp_min(1e-12)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that conversion keeps."""
    return {
        name: tuple(weight.shape) for name, weight in model.named_parameters() if ".processor." not in name
    }
