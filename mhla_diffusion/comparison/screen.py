"""Screening: one short run of each variant, so that what is clearly beaten is not run over all seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .task import Measure


@dataclass(frozen=True)
class Screen:
    """Rule by which variants go on to all seeds.

    Each is run once, with the first seed and a share of the steps. Those whose first metric is worse than
    that of the best by more than the margin are left out, each task for itself.

    Args:
        share: of the steps.
        margin: relative; 0.3 leaves out what has 1.3 times the loss of the best, or of a metric that is
            better when higher less than the best over 1.3.
        keep: names of variants that go on all the same, such as those that all others are compared with.

    Raises:
        ValueError: for a share outside (0, 1] or a margin that is not above 0.
    """

    share: float = 0.25
    margin: float = 0.3
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))
        if not 0 < self.share <= 1:
            raise ValueError(f"screen.share must be above 0 and at most 1, got {self.share}")
        if not self.margin > 0:
            raise ValueError(f"screen.margin must be above 0, got {self.margin}")

    def beaten(self, values: Mapping[str, float], metric: Measure) -> list[str]:
        """Return the names of those that are left out, by the values of all."""
        better = min if metric.lower_is_better else max
        best = better(values.values(), default=0.0)
        limit = best * (1 + self.margin) if metric.lower_is_better else best / (1 + self.margin)
        return [
            name
            for name, value in values.items()
            if name not in self.keep and (value > limit if metric.lower_is_better else value < limit)
        ]

    def rule(self, metric: Measure) -> str:
        """Return the rule in words."""
        kept = f" ({', '.join(self.keep)} always went on)" if self.keep else ""
        return (
            f"One run of the first seed and {self.share:.0%} of the steps each; left out is what is worse "
            f"than the best by more than {self.margin:.0%} in {metric.title.lower()}{kept}."
        )
