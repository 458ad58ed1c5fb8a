"""Progress of a run: how far it is, how fast, and whether it was asked to stop."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..files.writing import disk_errors, write_file

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Progress:
    """Count of the steps, what could not be read, and the loss since the last log line; part of checkpoints.

    Attributes:
        step: optimizer steps taken or skipped.
        unreadable: what could not be read, by number in the source: of this process since the last
            checkpoint, and of all before it.
    """

    def __init__(self) -> None:
        self.step = 0
        self.unreadable: dict[int, str] = {}
        self.start_interval()

    def start_interval(self) -> None:
        """Begin a new mean."""
        self._loss_sum = torch.zeros((), dtype=torch.float64)
        self._loss_steps = 0
        self._not_finite = torch.zeros((), dtype=torch.int64)

    def add(self, loss: Tensor, grad_norm: Tensor | None = None) -> None:
        """Count an optimizer step; does not wait for the device.

        Args:
            loss: mean over all processes.
            grad_norm: to be finite too; None where one that is not is dealt with, as in fp16.
        """
        self.step += 1
        self._loss_steps += 1
        self._loss_sum = self._loss_sum.to(loss.device) + loss.double()
        finite = loss.isfinite() if grad_norm is None else loss.isfinite() & grad_norm.isfinite()
        first = self._not_finite.to(loss.device)
        self._not_finite = torch.where((first > 0) | finite, first, self.step)

    def skip(self) -> None:
        """Count an optimizer step that was not taken."""
        self.step += 1

    def first_not_finite(self) -> int:
        """Return the first step of this interval whose loss or gradient was not finite, 0 for none."""
        return int(self._not_finite)

    def mean_loss(self) -> float:
        """Return the mean over the steps of this interval, NaN when all were skipped."""
        return float(self._loss_sum) / self._loss_steps if self._loss_steps else math.nan

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step, "loss_sum": self._loss_sum.cpu(), "loss_steps": self._loss_steps,
            "unreadable": self.unreadable,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self._loss_sum, self._loss_steps = state["step"], state["loss_sum"], state["loss_steps"]
        self.unreadable.update(state.get("unreadable", {}))  # which checkpoints of before do not hold


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
        with disk_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps({name: _as_json(value) for name, value in record.items()}) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run takes again, and those that a kill left damaged."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_file(self.path, "".join(line for line in lines if 0 <= _step_of(line) <= step))


def _as_json(value: Any) -> Any:
    """A value as JSON has it: null for one that is not finite, as of steps that were all skipped."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> int:
    """Step of a line of metrics, -1 of one that is damaged."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("}\n") else -1
    except (ValueError, TypeError, KeyError):
        return -1


class StopRequest:
    """Takes note of SIGINT and SIGTERM. A second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, Any] = {}
        self._interruptible = False

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def interruptible(self, work: Callable[[], T]) -> T | None:
        """Return what ``work`` returns; None, at once, when a signal comes before its end."""
        if self.signal:
            return None
        try:
            try:
                self._interruptible = True
                return work()
            finally:
                self._interruptible = False
        except _StopError:
            return None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        # By the system, as Python would wait for the end of what is running. SIGTERM may come twice, from a
        # launcher and from the one who stopped that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        logger.warning("%s: finishing this step and saving a checkpoint", signal.Signals(number).name)
        if self._interruptible:
            raise _StopError


class _StopError(Exception):
    pass
