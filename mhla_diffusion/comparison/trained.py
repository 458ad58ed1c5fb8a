"""Tasks whose models are of transformers, trained by its Trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
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
        checkpoint, _ = _last_checkpoint(folder)
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

        arguments = TrainingArguments(
            str(folder), max_steps=self.steps, per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size, learning_rate=self.learning_rate, seed=seed,
            lr_scheduler_type="cosine", warmup_steps=self.steps // 20, weight_decay=0.05, report_to=[],
            save_steps=self.checkpoint_every, save_total_limit=1, disable_tqdm=True, use_cpu=device == "cpu",
            logging_steps=max(1, self.steps // 10), dataloader_drop_last=True,
        )  # fmt: skip
        checkpoint, state = _last_checkpoint(folder)
        if state is not None and "Clock" not in state.stateful_callbacks:
            shutil.rmtree(folder)  # of before there was one: what a step took is not known
            checkpoint, state = None, None
        model = self.model(variant, seed)
        if checkpoint:  # the Trainer takes weights by name, and files have others for some models
            model = type(model).from_pretrained(checkpoint)
        clock = _clock(state)
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        if state is not None and state.global_step >= self.steps:
            trainer.state = state  # stopped behind its training, of which the Trainer would add a step
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if not losses or not math.isfinite(losses[-1]):
            raise ValueError(f"the loss became {losses[-1:]}; lower learning_rate")
        return trainer, {
            "loss": losses[-1],
            "seconds_per_step": clock.seconds / self.steps,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
        }


def _last_checkpoint(folder: Path) -> tuple[str | None, Any]:
    """Return the newest whole checkpoint of the Trainer and its state, which is written last of all."""
    from transformers import TrainerState

    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        with contextlib.suppress(OSError, ValueError):
            return str(path), TrainerState.load_from_json(str(path / "trainer_state.json"))
    return None, None


def _clock(state: Any) -> Any:
    """Make a callback that counts the ``seconds`` of all steps, also of those before a checkpoint."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class Clock(TrainerCallback, ExportableState):
        def __init__(self, seconds: float) -> None:
            self.seconds, self.begun = seconds, 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds += time.perf_counter() - self.begun

        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"seconds": self.seconds}}

    return Clock(0.0 if state is None else state.stateful_callbacks["Clock"]["attributes"]["seconds"])
