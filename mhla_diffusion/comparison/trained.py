"""Tasks whose models are of transformers, trained by its Trainer."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import MHLAConfig
from .task import Task
from .variant import Variant


@dataclass(frozen=True, kw_only=True)
class TrainedByTransformers(Task):
    """Base of the tasks, a stock model of transformers that starts alike with every attention.

    Args:
        layers, heads, head_dim: of the model.
        steps, batch_size, learning_rate: of training, AdamW with a cosine schedule.
        checkpoint_every: steps after which a run that is stopped goes on.
    """

    layers: int = 4
    heads: int = 2
    head_dim: int = 32
    steps: int
    batch_size: int = 32
    learning_rate: float = 2e-3
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, str) and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")

    def check(self, variant: Variant, config: MHLAConfig | None) -> None:
        if variant.attention == "softmax" and config is not None:
            raise ValueError(
                f"{variant.name}: softmax of {self.kind} is that of transformers: leave mhla out"
            )
        if variant.training:
            raise ValueError(f"{variant.name}: training is of tasks with a training run, not of {self.kind}")
        self.model(variant, 0)

    @abstractmethod
    def stock(self) -> Any:
        """Make the model with softmax."""

    def model(self, variant: Variant, seed: int) -> Any:
        """Make the model of a variant; all of a seed start alike where they have the same weights."""
        from ..domains.pretrained import convert

        torch.manual_seed(seed)
        config, stock = variant.config(self.default_blocks), self.stock()
        return stock if config is None else convert(stock, config)[0]

    def trained(self, variant: Variant, folder: Path) -> Any:
        from transformers.trainer_utils import get_last_checkpoint

        checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        return checkpoint and type(self.model(variant, 0)).from_pretrained(checkpoint)

    def fit(
        self, variant: Variant, seed: int, folder: Path, device: str, data: list[dict[str, Tensor]]
    ) -> tuple[Any, dict[str, Any]]:
        """Train, or go on where a run was stopped; all variants see the same data in the same order.

        Raises:
            ValueError: when the loss is not finite.
        """
        # Its import takes seconds, and most tasks need none of it.
        from transformers import PrinterCallback, Trainer, TrainingArguments
        from transformers.trainer_utils import get_last_checkpoint

        arguments = TrainingArguments(
            str(folder), max_steps=self.steps, per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size, learning_rate=self.learning_rate, seed=seed,
            lr_scheduler_type="cosine", warmup_steps=self.steps // 20, weight_decay=0.05, report_to=[],
            save_steps=self.checkpoint_every, save_total_limit=1, disable_tqdm=True, use_cpu=device == "cpu",
            logging_steps=max(1, self.steps // 10), dataloader_drop_last=True,
        )  # fmt: skip
        checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        model = self.model(variant, seed)
        if checkpoint:  # the Trainer takes weights by name, and files have others for some models
            model = type(model).from_pretrained(checkpoint)
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        first = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if not losses or not math.isfinite(losses[-1]):
            raise ValueError(
                f"{variant.name}, seed {seed}: the loss became {losses[-1:]}; lower learning_rate"
            )
        return trainer, {
            "loss": losses[-1],
            "seconds_per_step": metrics["train_runtime"] / max(1, self.steps - first),
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
        }
