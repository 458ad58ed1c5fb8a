"""Intervals over seeds, as every page of results has them."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from scipy import stats

_CONFIDENCE = 0.95


class Interval(NamedTuple):
    """Mean over seeds, and how far the mean of all seeds may lie from it, with a confidence of 95 %."""

    mean: float
    half: float
    seeds: int
    deviation: float = 0.0

    @classmethod
    def of(cls, values: list[float]) -> Interval:
        """Make Student's interval; of a single value it is as wide as there is."""
        if len(values) < 2:
            return cls(values[0], math.inf, len(values))
        width, deviation = stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1), statistics.stdev(values)
        mean = statistics.mean(values)
        return cls(mean, width * deviation / math.sqrt(len(values)), len(values), deviation)

    def is_above(self, other: Interval) -> bool:
        """Return whether the intervals lie apart, this one above."""
        return self.mean - self.half > other.mean + other.half

    def is_better(self, other: Interval, *, lower: bool) -> bool:
        """Return whether the intervals lie apart, this one on the better side, which may be the lower."""
        return other.is_above(self) if lower else self.is_above(other)

    def holds(self, value: float) -> bool:
        """Return whether the value lies within."""
        return abs(self.mean - value) <= self.half

    def difference_text(self, digits: int = 3) -> str:
        """Return a difference with its sign, and where it begins and ends."""
        ends = (self.mean, self.mean - self.half, self.mean + self.half)
        # No zero below zero.
        mean, low, high = (f"{round(value, digits) + 0.0:+.{digits}f}" for value in ends)
        return f"{mean} [{low}, {high}]"

    def text(self, digits: int = 3) -> str:
        """Return mean and interval, and in brackets the standard deviation over seeds."""
        if not math.isfinite(self.half):
            return f"{self.mean:.{digits}f} (one seed)"
        return f"{self.mean:.{digits}f} ± {self.half:.{digits}f} (sd {self.deviation:.{digits}f})"

    def __str__(self) -> str:
        return self.text()
