"""Progress of a run: how far it is, how fast, and whether it was asked to stop."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ..files.writing import write_file

logger = logging.getLogger(__name__)


class Progress:
    """Count of the steps, and the loss since the last log line; part of every checkpoint."""

    def __init__(self) -> None:
        self.step = 0
        self.start_interval()

    def start_interval(self) -> None:
        """Begin a new mean."""
        self._loss_sum = torch.zeros((), dtype=torch.float64)
        self._loss_steps = 0

    def add(self, loss: Tensor) -> None:
        """Count an optimizer step; does not wait for the device."""
        self.step += 1
        self._loss_steps += 1
        self._loss_sum = self._loss_sum.to(loss.device) + loss.double()

    def mean_loss(self) -> float:
        """Return the mean over the steps of this interval.

        Raises:
            FloatingPointError: when it is not finite.
        """
        mean = float(self._loss_sum) / max(self._loss_steps, 1)
        if not torch.isfinite(torch.tensor(mean)):
            raise FloatingPointError(
                f"the loss is {mean} at step {self.step}; go on from an earlier checkpoint with a lower "
                "trainer.optimizer.learning_rate, with trainer.max_grad_norm set, or in bf16 instead of fp16"
            )
        return mean

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "loss_sum": self._loss_sum.cpu(), "loss_steps": self._loss_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self._loss_sum, self._loss_steps = state["step"], state["loss_sum"], state["loss_steps"]


class Throughput:
    """Optimizer steps per second of training, without sampling and saving, and the wait for data in it."""

    def __init__(self) -> None:
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one step."""
        started = time.perf_counter()
        yield
        self._steps += 1
        self._seconds += time.perf_counter() - started

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the wait for a batch, inside a step."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    def take(self) -> tuple[float, float]:
        """Return steps per second since the last call, and the share of the time spent waiting for data."""
        seconds = max(self._seconds, 1e-9)
        rate, share = self._steps / seconds, self._waited / seconds
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        return rate, share


class MetricsFile:
    """File of one JSON object per line, in the order of the steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run takes again, and one that a kill cut short."""
        if not self.path.exists():
            return
        lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        write_file(self.path, "".join(line for line in lines if json.loads(line)["step"] <= step))


class StopRequest:
    """Takes note of the first SIGINT or SIGTERM; a second one acts as it always did."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        logger.warning("%s: finishing this step and saving a checkpoint", signal.Signals(number).name)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
