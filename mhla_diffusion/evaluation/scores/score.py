"""Score: a number with all that belongs to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """A number, what it is called, and everything that has to be said whenever it is shown.

    Args:
        name: such as ``fid_clean`` or ``recall_efficientnet_lite0``.
        value: the score.
        metric: what it is, whatever it was computed with: ``frechet``, ``kid``, ...
        extractor: that the features are of.
        higher_is_better: else lower is.
        interval: of 95 %; None when there was no bootstrap, or the score has none.
        curve: number of samples and score of subsets, for Frechet distances.
        extrapolated: to infinitely many samples along that curve; None when there are too few for it.
        classes: the score of each class, for scores that have one.
        flags: cautions.
    """

    name: str
    value: float
    metric: str = ""
    extractor: str = ""
    higher_is_better: bool = False
    interval: tuple[float, float] | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    extrapolated: float | None = None
    classes: dict[str, float] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        flags = f" ({' '.join(self.flags)})" if self.flags else ""
        return f"{self.name} = {self.text()}{flags}"

    def text(self) -> str:
        """The value and its interval, to as many places as the interval bears."""
        if self.interval is None:
            return f"{self.value:.{decimals(self.value / 100)}f}"
        low, high = self.interval
        places = decimals((high - low) / 2)
        return f"{self.value:.{places}f} [{low:.{places}f}, {high:.{places}f}]"


def decimals(spread: float) -> int:
    """Decimal places that show two digits of ``spread``, 2 to 6."""
    if spread <= 0 or not math.isfinite(spread):
        return 4
    return min(6, max(2, 1 - math.floor(math.log10(spread))))
