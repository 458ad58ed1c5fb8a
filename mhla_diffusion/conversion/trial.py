"""Assembled models on trial: whether summed errors of layers predict them, and a repair where they do not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..backbones.teacher import predict
from .calls import Calls
from .knapsack import Choice, Limits

logger = logging.getLogger(__name__)

# Rank correlation of predicted and measured errors, below which the sum of errors is not trusted.
_TRUSTED = 0.9
_POINTS = 6


class Trial:
    """Errors of assembled models on some calls.

    Args:
        teacher: whose predictions count.
        calls, numbers: of the teacher.
        assemble: called with the teacher and forms; returns the model.
    """

    def __init__(
        self, teacher: Any, calls: Calls, numbers: range, assemble: Callable[[Any, Sequence[str]], Any]
    ) -> None:
        self.teacher, self.calls, self.numbers, self.assemble = teacher, calls, numbers, assemble
        self._known: dict[tuple[str, ...], float] = {}

    @classmethod
    def of_aligned(
        cls, teacher: Any, calls: Calls, record: Mapping[str, Any], count: int,
        assemble: Callable[[Any, Sequence[str]], Any],
    ) -> Trial:  # fmt: skip
        """Make one of the first calls that no layer of an alignment was trained on."""
        first = record["settings"]["samples"]
        return cls(teacher, calls, range(first, first + count), assemble)

    def measure(self, choice: Choice) -> Choice:
        """Return a choice with its measured error, ``sum |p' - p| / sum |p|`` of predictions p."""
        if choice.forms not in self._known:
            student = self.assemble(self.teacher, choice.forms).eval()
            self._known[choice.forms] = prediction_error(self.teacher, student, self.calls, self.numbers)
        return replace(choice, measured=self._known[choice.forms])

    def check(
        self, choices: Sequence[Choice], chosen: Choice, limits: Limits, *, repairs: int
    ) -> tuple[Choice, dict[str, Any]]:
        """Return the choice, repaired where summed errors do not predict measured ones, and notes."""
        indices = np.linspace(0, len(choices) - 1, min(_POINTS, len(choices))).round().astype(int)
        points = [self.measure(choices[index]) for index in indices]
        chosen = self.measure(chosen)
        trust = rank_correlation([p.error for p in points], [_measured(p) for p in points])
        notes: dict[str, Any] = {
            "rank_correlation": trust,
            "points": [{"cost": p.cost, "error": p.error, "measured": p.measured} for p in points],
            "before_repair": chosen.measured,
        }
        if trust < _TRUSTED:
            logger.info("errors of layers predict those of models at rank correlation %.2f: repairing", trust)
            chosen = self.repair(chosen, limits, repairs)
        return chosen, {**notes, "models_measured": len(self._known)}

    def repair(self, choice: Choice, limits: Limits, most: int) -> Choice:
        """Go on greedily to better neighbours, of least summed error first, measuring ``most`` models."""
        best, last = self.measure(choice), len(self._known) + most
        improved = True
        while improved and len(self._known) < last:
            improved = False
            for neighbour in sorted(limits.neighbours(best), key=lambda found: found.error):
                if len(self._known) >= last:
                    break
                found = self.measure(neighbour)
                if _measured(found) < _measured(best):
                    best, improved = found, True
                    break
        return best


@torch.no_grad()
def prediction_error(teacher: Any, student: Any, calls: Calls, numbers: Sequence[int]) -> float:
    """Return ``sum |p' - p| / sum |p|``, p the teacher's predictions, mean over calls."""
    errors = []
    for number in numbers:
        inputs = calls(number)
        wanted = predict(teacher, inputs)
        errors.append(float((predict(student, inputs) - wanted).abs().sum() / wanted.abs().sum()))
    return sum(errors) / len(errors)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation; 1 of fewer than three pairs, 0 where all of one side are equal."""
    if len(first) < 3:
        return 1.0
    pairs = [np.subtract.outer(values, values) for values in (first, second)]
    ranks = [(pair > 0).sum(1) + (pair == 0).sum(1) / 2 for pair in pairs]  # equal values share their mean
    if min(map(np.ptp, ranks)) == 0:
        return 0.0
    return float(np.corrcoef(ranks)[0, 1])


def _measured(choice: Choice) -> float:
    assert choice.measured is not None
    return choice.measured
