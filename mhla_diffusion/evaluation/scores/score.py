"""Scores with all that belongs to each, and what has to be said of them together."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """Number with its name, its interval and its cautions.

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
        flags: cautions, which are shown once below all scores: see :func:`cautions`.
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
        return f"{self.name} = {self.text()}"

    def text(self) -> str:
        """Format the value and its interval."""
        if self.interval is None:
            return self.format(self.value)
        return f"{self.format(self.value)} [{', '.join(map(self.format, self.interval))}]"

    def format(self, number: float) -> str:
        """Format a number of this score, its value or another, to as many places as the interval bears."""
        spread = self.value / 100 if self.interval is None else (self.interval[1] - self.interval[0]) / 2
        return f"{number:.{decimals(spread)}f}"


def decimals(spread: float) -> int:
    """Number of decimal places that show two digits of ``spread``, 2 to 6."""
    if spread <= 0 or not math.isfinite(spread):
        return 4
    return min(6, max(2, 1 - math.floor(math.log10(spread))))


def cautions(scores: Collection[Score]) -> list[str]:
    """Collect the flags of scores, each once; those of some extractors or scores alone name them."""
    extractors = dict.fromkeys(score.extractor for score in scores)
    return once(
        {
            extractor: once({score.name: score.flags for score in scores if score.extractor == extractor})
            for extractor in extractors
        }
    )


def once(said: Mapping[str, Collection[str]]) -> list[str]:
    """Collect sentences, each once; one that not all say begins with the names of those who do."""
    names: dict[str, dict[str, None]] = {}
    for name, sentences in said.items():
        for sentence in sentences:
            names.setdefault(sentence, {})[name] = None
    return [
        sentence if len(its) == len(said) else f"{', '.join(its)}: {sentence}"
        for sentence, its in names.items()
    ]
