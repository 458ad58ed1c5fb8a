"""Calls that a teacher is asked: arguments of its forward, by number, at times spread evenly."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ..arguments import require_seed
from ..backbones import (
    MHLAWanTransformer3DModel,
)
from ..backbones.grid import token_grid
from ..backbones.teacher import place, predict
from ..training import ImageTrainingConfig, VideoTrainingConfig, stock
from ..training.config import as_dict, parse_config, with_later_fields
from ..training.data.fingerprint import fingerprint_of
from ..training.data.stream import FOR_DATA, FOR_LOSS, FOR_TIME, load_readable, sample_generator
from ..training.export import read_run_config
from ..training.image_models import NEW_IMAGES
from ..training.objectives import DistillationConfig, Objective, ObjectiveConfig, build_objective
from ..training.objectives.objective import ALL_TIMES, NUM_TRAIN_TIMESTEPS, require_times, with_beside

# Kinds of training run, whose data, conditions and objective a teacher of the class is asked with.
RUNS: dict[type[Any], type[Any]] = {
    **dict.fromkeys([*NEW_IMAGES.values(), *stock.IMAGES], ImageTrainingConfig),
    **dict.fromkeys([MHLAWanTransformer3DModel, *stock.VIDEOS], VideoTrainingConfig),
}

TIME_BUCKETS = 10

logger = logging.getLogger(__name__)


def fresh_numbers(count: int) -> range:
    """Return the numbers of ``count`` calls for each bucket of times, far behind those that layers see."""
    return range(1_000_000, 1_000_000 + TIME_BUCKETS * count)


class Calls(ABC):
    """Calls of a model, one sample each; the same number gives the same call.

    Call ``n`` is at a time of bucket ``n mod 10``: tenths of the model's part of the way from data to noise.

    Args:
        model: the teacher.
        seed: of every draw.
        times: the model's part.

    Attributes:
        grid: of tokens.
    """

    grid: tuple[int, ...]

    def __init__(self, model: Any, *, seed: int = 0, times: tuple[float, float] = ALL_TIMES) -> None:
        require_seed(seed)
        self.model, self.seed, self.times = model, seed, times

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Everything that the calls depend on, beside the model, as plain values."""

    def completed(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return facts that an older version wrote, with the defaults of what came later."""
        return dict(facts)

    @abstractmethod
    def inputs(self, number: int) -> dict[str, Any]:
        """Return the arguments of call ``number``, on the CPU."""

    def __call__(self, number: int) -> dict[str, Any]:
        """Return the arguments of call ``number``, where the model is and in its dtype."""
        return place(self.model, self.inputs(number))

    def fraction(self, number: int) -> Tensor:
        """Time of call ``number``, ``[1]`` in [0, 1)."""
        generator = sample_generator(self.seed, number, FOR_TIME)
        fraction = (number % TIME_BUCKETS + torch.rand(1, generator=generator)) / TIME_BUCKETS
        low, high = self.times
        return low + (high - low) * fraction


class NoiseCalls(Calls):
    """Noise and drawn conditions, on any grid: to try things, as no model is trained for it but near t = 1.

    Args:
        model, seed, times: see :class:`Calls`.
        grid: of tokens; the model's own by default.
    """

    def __init__(
        self,
        model: Any,
        *,
        seed: int = 0,
        times: tuple[float, float] = ALL_TIMES,
        grid: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(model, seed=seed, times=times)
        self.grid = tuple(grid or model.default_grid)

    @property
    def facts(self) -> dict[str, Any]:
        part = {} if self.times == ALL_TIMES else {"times": list(self.times)}
        return {"data": "noise", "grid": list(self.grid), "seed": self.seed, **part}

    def inputs(self, number: int) -> dict[str, Any]:
        generator = sample_generator(self.seed, number, FOR_DATA)
        inputs = self.model.example_inputs(self.grid, generator=generator)
        return self.model.at_time(inputs, NUM_TRAIN_TIMESTEPS * float(self.fraction(number)))


class DataCalls(Calls):
    """Noisy samples of a training run's data, with its conditions, some of them dropped as it drops them.

    The next sample that can be read stands in for one that cannot, as in training.

    Args:
        model, seed: see :class:`Calls`.
        config: of the run.

    Raises:
        ValueError: when the data does not fit the model, or has several sizes.
    """

    def __init__(self, model: Any, config: Any, *, seed: int = 0) -> None:
        super().__init__(model, seed=seed, times=config.objective.times)
        self.config, self._skipped = config, set[int]()
        alone = replace(config.objective, teacher=None, distillation=DistillationConfig())
        self.objective: Objective = build_objective(alone)
        _, self.source, self.task = config.build(self.objective, model)
        if self.source.buckets is not None and len(set(self.source.buckets)) > 1:
            raise ValueError(
                "the data has several sizes: layers are aligned on one; give data.sizes one size"
            )
        self.task.conditioning.to(model.device)

    @property
    def facts(self) -> dict[str, Any]:
        names = ("data", "text", "class_dropout", "caption_dropout", "objective")
        kept = {name: value for name, value in as_dict(self.config).items() if name in names}
        return {**_without_all_times(kept), "seed": self.seed, "fingerprint": self._fingerprint}

    @cached_property
    def _fingerprint(self) -> str | None:
        return fingerprint_of(self.source)

    def completed(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        filled = _without_all_times(with_later_fields(facts, self.config))
        filled = {"fingerprint": self._fingerprint, **filled}
        return {name: value for name, value in filled.items() if name in facts or name in self.facts}

    @cached_property
    def grid(self) -> tuple[int, ...]:  # type: ignore[override]
        # Of the samples: what the model is given of them may be packed, or have its channels last.
        patch = self.model.latents_per_token
        return token_grid(self.sample(0)[0].shape[-len(patch) :], patch)

    def sample(self, number: int) -> tuple[Tensor, dict[str, Any], Tensor, Tensor]:
        """Return a clean sample ``[1, C, ...]``, its conditions, its time ``[1]`` and its noise."""
        order = sample_generator(self.seed, number // len(self.source), FOR_DATA)
        index = int(torch.randperm(len(self.source), generator=order)[number % len(self.source)])
        sample, generator, unreadable = load_readable(
            self.source, index, lambda: sample_generator(self.seed, number, FOR_LOSS)
        )
        for skipped, reason in unreadable:
            if skipped not in self._skipped:
                logger.warning("skipped: %s", reason)
                self._skipped.add(skipped)
        batch = default_collate([sample])
        samples = batch["samples"]
        conditions = self.task.conditioning.arguments(batch, [generator])
        noise = torch.randn(samples.shape, generator=generator)
        return samples, conditions, self.objective.time_at(self.fraction(number)), noise

    def inputs(self, number: int) -> dict[str, Any]:
        samples, conditions, times, noise = self.sample(number)
        noisy, conditions = with_beside(self.objective.noisy(samples.float(), times, noise), conditions)
        return self.model.denoising_arguments(noisy, self.objective.timestep(times), conditions)

    @torch.no_grad()
    def loss(self, model: Any, number: int) -> float:
        """Loss of the run's objective for a model at call ``number``."""
        samples, conditions, times, noise = self.sample(number)
        placed = place(self.model, conditions)
        samples, noise, times = (x.to(self.model.device) for x in (samples.float(), noise, times))
        return float(self.objective.loss_at(model, samples, placed, times=times, noise=noise))


class SampledCalls(Calls):
    """Noisy samples of the teacher's own, of the conditions that its ``example_inputs`` draw: no data needed.

    A sample is made by steps of the objective's scheduler, without guidance, and noised to the call's time.

    Args:
        model, seed: see :class:`Calls`.
        objective: that the teacher was trained with; flow matching by default.
        steps: of the scheduler.
        grid: of tokens; the model's own by default.

    Raises:
        ValueError: for a model that goes from noise to data.
    """

    def __init__(
        self,
        model: Any,
        *,
        seed: int = 0,
        objective: ObjectiveConfig | None = None,
        steps: int = 20,
        grid: tuple[int, ...] | None = None,
    ) -> None:
        if model.time_of(0) != 0:
            raise ValueError(
                f"{type(model).__name__} counts its time from noise to data and predicts that way, which no "
                "objective here does: it makes no samples; say noise"
            )
        super().__init__(model, seed=seed)
        self.settings = objective or ObjectiveConfig()
        self.objective, self.steps = build_objective(self.settings), steps
        self.grid = tuple(grid or model.default_grid)

    @property
    def facts(self) -> dict[str, Any]:
        facts = {
            "data": "samples", "objective": as_dict(self.settings), "steps": self.steps,
            "grid": list(self.grid), "seed": self.seed,
        }  # fmt: skip
        return _without_all_times(facts)

    @torch.no_grad()
    def inputs(self, number: int) -> dict[str, Any]:
        generator = sample_generator(self.seed, number, FOR_DATA)
        inputs = self.model.example_inputs(self.grid, generator=generator)
        placed = place(self.model, inputs)
        x, scheduler = placed["hidden_states"], self.objective.scheduler()
        scheduler.set_timesteps(self.steps)
        for timestep, until in pairwise([*scheduler.timesteps, 0]):
            at = self.model.at_time(placed, float(timestep), until=float(until))
            prediction = predict(self.model, {**at, "hidden_states": x}).to(x.dtype)
            if self.objective.predicts_variance:
                prediction = prediction.chunk(2, 1)[0]
            if prediction.shape != x.shape:
                raise ValueError(
                    f"the teacher predicts {list(prediction.shape[1:])} for {list(x.shape[1:])}: say "
                    "samples-ddpm where it predicts variances; for models that are given pictures, give data"
                )
            x = scheduler.step(prediction, timestep, x).prev_sample
        times = self.objective.time_at(self.fraction(number))
        noise = torch.randn(x.shape, generator=generator)
        noisy = self.objective.noisy(x.float().cpu(), times, noise)
        inputs = self.model.at_time(inputs, float(self.objective.timestep(times)))
        return {**inputs, "hidden_states": noisy}


def _without_all_times(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts without the times of a model that is for all, as those of earlier versions are."""
    objective = dict(facts["objective"])
    if objective.get("times") == list(ALL_TIMES):
        del objective["times"]
    return {**facts, "objective": objective}


def open_calls(
    model: Any,
    data: str,
    *,
    seed: int = 0,
    grid: tuple[int, ...] | None = None,
    times: tuple[float, float] | None = None,
) -> Calls:
    """Return the calls that a word or a file names.

    Args:
        model: the teacher.
        data: YAML of a training run, whose data, conditions and objective are taken; ``"samples"``, the
            teacher's own (of flow matching; ``"samples-ddpm"`` of DDPM); or ``"noise"``.
        seed: of every draw.
        grid: of tokens, for samples and noise; the model's own by default.
        times: of a model that is one of two experts, see :func:`mhla_diffusion.hub.expert_times`; a run whose
            ``objective.times`` are all times is given these.

    Raises:
        ValueError: for another word, a run of a kind that the model has no training of, data that does not
            fit the model, or samples of an expert.
    """
    if data == "noise":
        return NoiseCalls(model, seed=seed, grid=grid, times=times or ALL_TIMES)
    if data in ("samples", "samples-ddpm"):
        if times is not None:
            raise ValueError(
                f"{data} would be of this transformer alone, which is for times {times[0]:g} to "
                f"{times[1]:g}: give the YAML of a training run"
            )
        objective = ObjectiveConfig(name="ddpm" if data.endswith("ddpm") else "flow")
        return SampledCalls(model, seed=seed, objective=objective, grid=grid)
    run = run_of(model, data)
    if times is not None and run.objective.times == ALL_TIMES:
        run = replace(run, objective=replace(run.objective, times=times))
    require_times(run.objective.times, times, "the model")
    return DataCalls(model, run, seed=seed)


def run_of(model: Any, path: str) -> Any:
    """Read the config of a training run for models of this class.

    Raises:
        ValueError: when there is no such file, or no training of such a model.
    """
    config_class = RUNS.get(type(model))
    if config_class is None:
        raise ValueError(
            f"there is no training of {type(model).__name__} that could give data: say noise or samples, got "
            f"{path!r}"
        )
    if not Path(path).is_file():
        raise ValueError(
            f"data must be the YAML file of a training run, samples, samples-ddpm or noise, got {path!r}"
        )
    try:
        return parse_config(config_class, ["--config", path])[0]
    except ValueError as error:
        if not _is_run(path):
            raise
        made = "images" if config_class is ImageTrainingConfig else "videos"
        raise ValueError(
            f"{path} is no training run of {made}, which {type(model).__name__} is a model of"
        ) from error


def _is_run(path: str) -> bool:
    """Tell a run of any kind from a file with mistakes."""
    try:
        read_run_config(path)
    except ValueError:
        return False
    return True
