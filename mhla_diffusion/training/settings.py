"""Settings that every training run has, and what its model card says of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from accelerate.tracking import get_available_trackers
from torch import nn

from ..arguments import MAX_NUMPY_SEED, require_seed
from ..attention import MHLA
from .adapters import LoraConfig
from .config import changeable, decisive_settings
from .data.stream import SampleSource
from .objectives import Objective, ObjectiveConfig
from .task import TrainingTask

Weights = Literal["averaged", "raw"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate.

    Args:
        learning_rate: at the height of the schedule.
        betas, eps, weight_decay: of AdamW.
        schedule: diffusers' name for the shape of the learning rate over ``max_steps``.
        warmup_steps: of linear growth at the start.
        mixing_rate: learning rate of mixing matrices, as a multiple of that of all else; 0 leaves them as
            they start.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = "constant"
    warmup_steps: int = 0
    mixing_rate: float = 1.0

    @property
    def depends_on_end(self) -> bool:
        """Return whether the learning rate of a step depends on how many there will be."""
        return not self.schedule.startswith("constant")

    def __post_init__(self) -> None:
        _require(self, "learning_rate", 0 < self.learning_rate < math.inf, "positive and finite")
        _require(self, "mixing_rate", 0 <= self.mixing_rate < math.inf, "0 or more, and finite")
        _require(self, "warmup_steps", self.warmup_steps >= 0, "0 or more")
        if self.schedule == "constant" and self.warmup_steps:
            raise ValueError(
                "the schedule constant has no warmup: set optimizer.schedule to constant_with_warmup"
            )


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of the training loop.

    Args:
        batch_size: samples per optimizer step over all processes; divides by processes x accumulation steps.
        max_steps: optimizer steps.
        gradient_accumulation_steps: forward passes per optimizer step in each process.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        max_grad_norm: gradients are scaled down to this norm; None for no limit.
        mixed_precision: autocast dtype; weights stay in fp32. fp16 needs a GPU.
        ema_decay: of the averaged weights, which are what is sampled and saved. Lower in the first steps,
            ``(1 + step) / (10 + step)``.
        seed: of the weights, the order of the data and every draw.
        optimizer: see :class:`OptimizerConfig`.
        num_workers: processes that read data ahead, for each process of the run.
        log_every: steps between log lines, which give the mean loss since the last.
        checkpoint_every: steps between checkpoints; one is written at the end and on SIGINT and SIGTERM too.
        keep_checkpoints: how many to keep.
        skip_steps: optimizer steps, counted from 1, to pass over, as their batch made the loss not finite.
        trackers: besides the log and metrics.jsonl.

    Raises:
        ValueError: for a value outside its range.
    """

    batch_size: int
    max_steps: int = changeable()
    gradient_accumulation_steps: int = changeable(1)
    gradient_checkpointing: bool = changeable(False)
    max_grad_norm: float | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    ema_decay: float = 0.9999
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    log_every: int = changeable(100)
    checkpoint_every: int = changeable(10_000)
    keep_checkpoints: int = changeable(2)
    num_workers: int = changeable(0)
    skip_steps: tuple[int, ...] = changeable(())
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = changeable(())

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "batch_size",
            "gradient_accumulation_steps",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            _require(self, name, getattr(self, name) >= 1, "1 or more")
        _require(self, "num_workers", self.num_workers >= 0, "0 or more")
        _require(self, "max_grad_norm", self.max_grad_norm is None or self.max_grad_norm > 0, "positive")
        _require(self, "ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        require_seed(self.seed, most=MAX_NUMPY_SEED)
        _require(self, "skip_steps", all(step >= 1 for step in self.skip_steps), "counted from 1")
        if sum(step <= self.max_steps for step in {*self.skip_steps}) == self.max_steps:
            raise ValueError(f"skip_steps names all of the {self.max_steps} steps: nothing would be trained")
        installed = {str(tracker.value) for tracker in get_available_trackers()}
        if missing := [name for name in self.trackers if name not in installed]:
            raise ValueError(f"trackers: {missing[0]} is not installed; pip install {missing[0]}")


def _require(config: Any, name: str, holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {what}, got {getattr(config, name)}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Config of a training run, the part that every kind has.

    Args:
        trainer: see :class:`TrainerConfig`.
        output_dir: where everything is written; new or empty unless the run is resumed.
        objective: see :class:`ObjectiveConfig`.
        trainable: ``"all"`` weights, or those of self-``"attention"`` alone.
        lora: with a rank, self-attention is trained in full and all else through adapters.
    """

    trainer: TrainerConfig
    output_dir: str = changeable()
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    trainable: Literal["all", "attention"] = "all"
    lora: LoraConfig = field(default_factory=LoraConfig)

    def build(self, objective: Objective, model: Any = None) -> tuple[Any, SampleSource, TrainingTask]:
        """Build the model, on the CPU in fp32, unless one is given, the data and the task.

        Raises:
            ValueError: when parts of the config do not fit together, or the data is not what it should be.
        """
        raise NotImplementedError


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return what is trained, for an optimizer: one group, or that of mixing matrices and the others."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.mixing_rate == 1:
        return [{"params": trained}]
    mixing = {id(module.mixing) for module in model.modules() if isinstance(module, MHLA)}
    return [
        {"params": [parameter for parameter in trained if id(parameter) not in mixing]},
        {
            "params": [parameter for parameter in trained if id(parameter) in mixing],
            "lr": config.learning_rate * config.mixing_rate,
        },
    ]


def run_facts(
    config: RunConfig,
    num_samples: int,
    step: int,
    objective: Mapping[str, Any],
    *,
    data: str | None = None,
    num_unreadable: int = 0,
    weights: Weights = "averaged",
) -> dict[str, Any]:
    """Return what a model card should say of a run, in the card's words.

    ``settings`` is not for the card: it tells runs that differ in their seed alone from all others.

    Args:
        config: of the run.
        num_samples: in its data.
        step: of the optimizer that it has come to.
        objective: what it says of itself.
        data: fingerprint of the data; None when they have none.
        num_unreadable: samples that were skipped.
        weights: ``"averaged"`` or ``"raw"``.
    """
    trainer, optim = config.trainer, config.trainer.optimizer
    average = f"average with decay {trainer.ema_decay:g}"
    facts: dict[str, Any] = {
        "data": f"{num_samples:,} samples",
        "steps": f"{step:,} of batch size {trainer.batch_size}",
        **objective,
        "optimizer": f"AdamW, learning rate {optim.learning_rate:g}, {optim.schedule}",
        "precision": "fp32" if trainer.mixed_precision == "no" else trainer.mixed_precision,
        "weights": average if weights == "averaged" else "as the optimizer has them, not averaged",
        "seed": trainer.seed,
        "trained": _trained(config),
    }
    sampling, model = getattr(config, "sampling", None), getattr(config, "model", None)
    if sampling is not None:
        names = ("num_inference_steps", "guidance_scale")
        facts["sampled with"] = {name: getattr(sampling, name) for name in names}
    if model is not None and model.init_from is not None:
        facts["base model"] = model.init_from
    if data is not None:
        facts["data fingerprint"] = data
    if num_unreadable:
        facts["unreadable samples"] = num_unreadable
    settings = decisive_settings(config)
    if config.trainer.optimizer.depends_on_end:
        settings["trainer.max_steps"] = config.trainer.max_steps
    said = ("trainer.seed", "model.init_from")  # above
    return facts | {"settings": {key: value for key, value in settings.items() if key not in said}}


def _trained(config: RunConfig) -> str:
    if config.lora.rank:
        return f"self-attention in full, all else through adapters of rank {config.lora.rank} (LoRA)"
    return "all weights" if config.trainable == "all" else "self-attention alone"
