"""Page of a comparison: a table for each setting, with intervals over seeds, and the records beside it."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from ..files.text import markdown_table
from ..files.writing import write_file
from .config import Comparison, Variant

_CONFIDENCE = 0.95


class Interval(NamedTuple):
    """Mean over seeds, and how far the mean of all seeds may lie from it, with a confidence of 95 %."""

    mean: float
    half: float
    seeds: int

    @classmethod
    def of(cls, values: list[float]) -> Interval:
        """Make Student's interval; of a single value it is as wide as there is."""
        if len(values) < 2:
            return cls(values[0], math.inf, len(values))
        width = stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1)
        return cls(
            statistics.mean(values), width * statistics.stdev(values) / math.sqrt(len(values)), len(values)
        )

    def is_above(self, other: Interval) -> bool:
        """Return whether the intervals lie apart, this one above."""
        return self.mean - self.half > other.mean + other.half

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.half:.3f}" if math.isfinite(self.half) else " (one seed)")


def write_page(comparison: Comparison, records: list[dict[str, Any]], folder: Path, command: str) -> Path:
    """Write ``NAME.md`` and ``NAME.json``.

    A table has a row for each variant and a column for each value of the last of the settings. What is best
    is bold where its interval lies apart from those of all others, and nothing is where none does.

    Args:
        records: of :func:`mhla_diffusion.comparison.compare_attention`.
        command: that makes them, as the page tells it.

    Returns:
        The path of the page.
    """
    page = folder / f"{comparison.name}.md"
    write_file(page.with_suffix(".json"), json.dumps({"command": command, "runs": records}, indent=1) + "\n")
    write_file(page, "\n\n".join(_parts(comparison, records, command)) + "\n")
    return page


def _parts(comparison: Comparison, records: list[dict[str, Any]], command: str) -> list[str]:
    wanted = len(list(comparison.tasks())) * len(comparison.variants) * len(comparison.seeds)
    devices = ", ".join(sorted({record["device"] for record in records})) or "none"
    parts = [
        f"# {comparison.name.replace('_', ' ').capitalize()}",
        f"`{command}`, on {devices}. Share of answers that are right, mean over "
        f"{len(comparison.seeds)} seeds and its 95 % interval; chance is 1 in the number of values, "
        f"{', '.join(map(str, sorted({task.values for task in comparison.tasks()})))}.",
    ]
    if len(records) < wanted:
        parts.append(f"**Incomplete: {len(records)} of {wanted} runs are done.**")
    *outer, (column, values) = comparison.settings.items()
    for fixed in itertools.product(*(choices for _, choices in outer)):
        setting = dict(zip((name for name, _ in outer), fixed, strict=True))
        title = ", ".join(f"{name} {value}" for name, value in setting.items())
        rows = [["", *(_heading(column, value) for value in values)]]
        columns = [_column(comparison, records, {**setting, column: value}) for value in values]
        for variant in comparison.variants:
            rows.append([variant.name, *(cells[variant.name] for cells in columns)])
        parts += [f"## {title or 'All'}", markdown_table(rows)]
    return [*parts, "## Time", markdown_table(_times(comparison, records))]


def _heading(name: str, value: Any) -> str:
    return f"{value**2:,} tokens" if name == "side" else f"{name} {value}"


def _column(comparison: Comparison, records: list[dict[str, Any]], setting: dict[str, Any]) -> dict[str, str]:
    """Cells of a column by variant."""
    found = {v.name: _values(records, v, setting, "accuracy") for v in comparison.variants}
    intervals = {name: Interval.of(values) for name, values in found.items() if values}
    cells = dict.fromkeys(found, "")
    for name, interval in intervals.items():
        best = all(interval.is_above(other) for key, other in intervals.items() if key != name)
        missing = f" ({interval.seeds} seeds)" if 1 < interval.seeds < len(comparison.seeds) else ""
        cells[name] = (f"**{interval}**" if best and len(intervals) > 1 else str(interval)) + missing
    return cells


def _values(
    records: list[dict[str, Any]], variant: Variant, setting: dict[str, Any], key: str
) -> list[float]:
    return [
        record[key]
        for record in records
        if record["variant"]["name"] == variant.name and setting.items() <= record["task"].items()
    ]


def _times(comparison: Comparison, records: list[dict[str, Any]]) -> list[list[str]]:
    """Median time of a step, beside other runs of the comparison, and the parameters."""
    rows = [["", *(f"{side**2:,} tokens, ms a step" for side in _sides(records)), "parameters"]]
    for variant in comparison.variants:
        steps = [_values(records, variant, {"side": side}, "seconds_per_step") for side in _sides(records)]
        sizes = sorted(set(map(int, _values(records, variant, {}, "parameters"))))
        times = (f"{statistics.median(values) * 1e3:.1f}" if values else "" for values in steps)
        rows.append([variant.name, *times, " to ".join(f"{size:,}" for size in (sizes[:1] + sizes[1:][-1:]))])
    return rows


def _sides(records: list[dict[str, Any]]) -> list[int]:
    return sorted({record["task"]["side"] for record in records})
