"""Objective: what a diffusion model is trained to predict, and the scheduler that samples from it.

An objective sees a model, clean samples and one random generator per sample, and returns one loss per sample:
nothing here knows images from video.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...backbones.denoising import denoise, unwrapped

NUM_TRAIN_TIMESTEPS = 1000
ALL_TIMES = (0.0, 1.0)
# Times that are never drawn in so many are an error of the settings.
_MOST_DRAWS = 10_000

Denoiser = Callable[..., Any]

BESIDE = "beside"
"""Name of what stands beside the noisy samples, as further channels, among the conditions."""


@dataclass(frozen=True)
class DistillationConfig:
    """Weights of what is added to the loss on data, where ``objective.teacher`` names a teacher.

    The weights 1, 0.5 and 0.5 are CLEAR's (arXiv 2412.16112), whose error of attention is absolute and does
    not fade; that of variances is LiT's (arXiv 2501.12976).

    Args:
        data: of the objective's own loss; there is none where guidance is distilled.
        prediction: of the student's prediction against the teacher's, in the loss of the objective.
        variance: of that of learned variances, with ``ddpm``.
        attention: of the relative squared error of the outputs of self-attention.
        every: layers to the next one whose outputs are compared.
        fade_steps: optimizer steps over which the weight of attention falls to 0, linearly.
        guidance_scale: of the teacher's prediction. 1: the student is guided in sampling as the teacher is.
            Above 1: guidance is distilled, and the student is sampled at scale 1.
        teacher_dtype: of the teacher's weights.

    Raises:
        ValueError: for a weight below 0, or another number below 1.
    """

    data: float = 1.0
    prediction: float = 0.5
    variance: float = 0.05
    attention: float = 0.5
    every: int = 4
    fade_steps: int = 1000
    guidance_scale: float = 1.0
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        for least, names in (
            (0, ("data", "prediction", "variance", "attention")),
            (1, ("every", "fade_steps", "guidance_scale")),
        ):
            for name in names:
                if not least <= getattr(self, name) < math.inf:
                    raise ValueError(
                        f"objective.distillation.{name} must be {least} or more, got {getattr(self, name)}"
                    )


@dataclass(frozen=True)
class ObjectiveConfig:
    """Name of an objective, and its settings.

    Args:
        name: ``"flow"`` (flow matching, as Sana and Wan were trained) or ``"ddpm"`` (as DiT and PixArt were).
        prediction_type: what the model returns, by diffusers' names. Of flow ``"flow_prediction"``, the
            velocity, or ``"sample"``, the clean sample, for models on pixels whose patches hold about as many
            numbers as a token is wide, or more. Of ddpm ``"epsilon"``, the noise, which is meant where
            nothing is given, ``"v_prediction"`` or ``"sample"``.
        learn_variance: ddpm only. The model has twice the channels and returns the variance too, as DiT and
            PixArt do.
        beta_schedule: ddpm only. How the variance of the noise of each step grows, by diffusers' names:
            evenly (``"linear"``), or its square root (``"scaled_linear"``).
        beta_start: of the first step.
        beta_end: of the last step.
        weighting_scheme: flow only. How times are drawn and losses weighted, by diffusers' names:
            ``"logit_normal"`` and ``"mode"`` draw times unevenly, ``"sigma_sqrt"`` and ``"cosmap"`` weight
            losses at even times, ``"none"`` does neither.
        logit_mean, logit_std: of ``logit(t)`` in ``logit_normal``; a higher mean means noisier samples.
        mode_scale: of ``mode``.
        shift: flow only. Moves times towards noise, ``s t / (1 + (s - 1) t)``; the saved scheduler has the
            same shift.
        times: that the model is for, from 0, of data, up to 1, of noise: of the two experts of
            Wan2.2-T2V-A14B ``transformer`` has 0.875 to 1 and ``transformer_2`` 0 to 0.875. Times are drawn
            as without it, those outside again.
        teacher: folder or hub id of a model to distil from: the one, with softmax attention, that the student
            was made of.
        distillation: see :class:`DistillationConfig`.

    Raises:
        ValueError: for a scale or shift that is not positive, variances that are not in (0, 1) and rising,
            times that are not in [0, 1] and rising, or a setting of the other objective.
    """

    name: Literal["flow", "ddpm"] = "flow"
    prediction_type: Literal["flow_prediction", "sample", "epsilon", "v_prediction"] = "flow_prediction"
    weighting_scheme: Literal["logit_normal", "mode", "sigma_sqrt", "cosmap", "none"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 1.0
    learn_variance: bool = True
    beta_schedule: Literal["linear", "scaled_linear"] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    times: tuple[float, float] = ALL_TIMES
    teacher: str | None = None
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        for name in ("logit_std", "shift"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"objective.{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                "objective.beta_start and objective.beta_end must be above 0, below 1 and in this order, got "
                f"{self.beta_start} and {self.beta_end}"
            )
        if not 0 <= self.times[0] < self.times[1] <= 1:
            raise ValueError(f"objective.times must be two of 0 to 1, in this order, got {list(self.times)}")
        if self.teacher is None and self.distillation != DistillationConfig():
            raise ValueError("objective.distillation needs a teacher: give objective.teacher, or remove it")
        both = ("name", "prediction_type", "times", "teacher", "distillation")
        of_ddpm = ("learn_variance", "beta_schedule", "beta_start", "beta_end")
        given = {
            its.name: "ddpm" if its.name in of_ddpm else "flow"
            for its in fields(self)
            if its.name not in both and getattr(self, its.name) != its.default
        }
        if self.name == "flow" and self.prediction_type in ("epsilon", "v_prediction"):
            given["prediction_type"] = "ddpm"
        for name, taker in given.items():
            if taker != self.name:
                raise ValueError(
                    f"objective.{name} is for objective.name {taker} alone; remove it, or set the name to "
                    f"{taker}"
                )


def require_times(times: tuple[float, float], own: tuple[float, float] | None, path: str) -> None:
    """Refuse times of a run that are not those of its model, one of two experts.

    Args:
        times: of the run.
        own: of the model at ``path``; None where it is for all times.

    Raises:
        ValueError: naming both.
    """
    if own is not None and not own[0] <= times[0] < times[1] <= own[1]:
        raise ValueError(
            f"{path} is one of two transformers, for times {own[0]:g} to {own[1]:g}, but objective.times are "
            f"{times[0]:g} to {times[1]:g}: set them to {list(own)}"
        )


def with_beside(noisy: Tensor, conditioning: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return noisy samples with what is under :data:`BESIDE` as further channels, and the others."""
    others = dict(conditioning)
    beside = others.pop(BESIDE, None)
    return noisy if beside is None else torch.cat([noisy, beside], dim=1), others


class Objective(ABC):
    """Loss of each sample, for any model called as ``model(noisy, timestep=..., **conditioning)``."""

    predicts_variance: bool
    """True when the model has 2C output channels: the prediction, then its variance."""

    step: int = 0
    """Optimizer steps that were taken."""

    times: tuple[float, float] = ALL_TIMES
    """Part of the way from data to noise that times are drawn from."""

    def loss(
        self,
        model: Denoiser,
        samples: Tensor,
        conditioning: Mapping[str, Any],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Return the loss at times and noise drawn from each sample's own generator.

        Args:
            model: returns a tuple whose first element is the prediction when ``return_dict=False``.
            samples: clean data ``[B, C, ...]``, about unit scale.
            conditioning: further keyword arguments of the model, each with B rows.
            generators: B generators on the CPU.

        Returns:
            ``[B]``, the mean over the values of each sample.
        """
        times, noise = self.draw(samples, generators)
        if not getattr(unwrapped(model), "one_by_one", False):
            return self.loss_at(model, samples, conditioning, times=times, noise=noise)
        losses = []
        for row in (slice(number, number + 1) for number in range(len(samples))):
            its = {name: value[row] for name, value in conditioning.items()}
            losses.append(self.loss_at(model, samples[row], its, times=times[row], noise=noise[row]))
        return torch.cat(losses)

    def draw(self, samples: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Draw a time ``[B]`` and standard normal noise for each sample, from its own generator."""
        times = torch.cat([self.draw_time(generator) for generator in generators]).to(samples.device)
        noise = randn_tensor(
            tuple(samples.shape), generator=list(generators), device=samples.device, dtype=samples.dtype
        )
        return times, noise

    def loss_at(
        self,
        model: Denoiser,
        samples: Tensor,
        conditioning: Mapping[str, Any],
        *,
        times: Tensor,
        noise: Tensor,
    ) -> Tensor:
        """Return the loss ``[B]`` at given times ``[B]`` and standard normal noise of the samples' shape."""
        noisy = self.noisy(samples, times, noise)
        prediction = self.predict(model, noisy, times, conditioning)
        return self.loss_of(prediction, samples, times=times, noise=noise)

    def predict(
        self, model: Denoiser, noisy: Tensor, times: Tensor, conditioning: Mapping[str, Any]
    ) -> Tensor:
        """Return what a model, the trained one or another, makes of noisy samples, in fp32.

        It is given what ``conditioning`` has under :data:`BESIDE` as further channels.
        """
        noisy, conditioning = with_beside(noisy, conditioning)
        return denoise(model, noisy, self.timestep(times), conditioning).float()

    def prepare(self, model: Any, accelerator: Accelerator) -> None:  # noqa: B027 (most need nothing)
        """Take what the loss needs beside the model, which is prepared, to where it is."""

    def facts(self) -> dict[str, str]:
        """Return what a model card says of the objective."""
        return {"objective": type(self).__name__}

    def timestep(self, times: Tensor) -> Tensor:
        """Return what the model is given for times ``[B]``."""
        return times

    @abstractmethod
    def time_at(self, fractions: Tensor) -> Tensor:
        """Return times ``[B]`` for fractions in [0, 1) of the way from data to noise."""

    def draw_time(self, generator: torch.Generator) -> Tensor:
        """Draw one of the model's times, ``[1]``.

        Raises:
            ValueError: where the objective draws almost none of them.
        """
        low, high = self.times
        for _ in range(_MOST_DRAWS):
            time = self._draw_time(generator)
            place = float(self.timestep(time)) / NUM_TRAIN_TIMESTEPS
            if low <= place and (place < high or high == 1):
                return time
        raise ValueError(
            f"the objective draws no times of objective.times {list(self.times)}: choose another "
            "weighting_scheme or shift"
        )

    @abstractmethod
    def _draw_time(self, generator: torch.Generator) -> Tensor:
        """Draw a time of all, ``[1]``."""

    @abstractmethod
    def noisy(self, samples: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """Return the samples with the noise that they have at their times."""

    @abstractmethod
    def loss_of(self, prediction: Tensor, samples: Tensor, *, times: Tensor, noise: Tensor) -> Tensor:
        """Return the loss ``[B]`` of what :meth:`predict` gave for ``noisy(samples, times, noise)``."""

    @abstractmethod
    def difference(self, prediction: Tensor, other: Tensor, *, times: Tensor) -> Tensor:
        """Return the loss ``[B]`` between two predictions, variances aside, weighted as that on data is."""

    @abstractmethod
    def scheduler(self) -> Any:
        """Return the diffusers scheduler that samples from a model trained on this objective."""

    def out_channels(self, in_channels: int) -> int:
        """Return how many channels the model must have as output."""
        return in_channels * (2 if self.predicts_variance else 1)


def as_column(values: Tensor, samples: Tensor) -> Tensor:
    """View ``[B]`` as ``[B, 1, ...]``."""
    return values.view(-1, *[1] * (samples.ndim - 1))


def mean_flat(x: Tensor) -> Tensor:
    """Return the mean of each sample, ``[B, ...]`` to ``[B]``."""
    return x.flatten(1).mean(1)
