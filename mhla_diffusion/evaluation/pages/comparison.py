"""Several reports side by side: their scores, and whether they may be compared at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...files.pages import render
from ...files.writing import write_together
from ..scores.score import Score, cautions, decimals, once
from .notebook import in_frame
from .report import encode
from .runs import Group, Run, differing, group_runs, load_run, short_names, tell_apart

FILE_NAMES = ("comparison.md", "comparison.html")


@dataclass(frozen=True)
class ScoreRow:
    """Score in all runs; None where a run has it not.

    Args:
        name: of the score.
        scores: one a run.
        best: indices of the best runs: those whose interval meets that of the best value.
        means: mean and standard deviation over the runs of each group; None for a single run, where one has
            it not, where runs share samples, and when runs may not be compared.
    """

    name: str
    scores: list[Score | None]
    best: list[int]
    means: list[tuple[float, float] | None]

    def summary(self, group: int) -> str:
        """Format mean and standard deviation over the runs of a group; empty when there are none."""
        found = self.means[group]
        if found is None:
            return ""
        places = decimals(found[1])
        return f"{found[0]:.{places}f} ± {found[1]:.{places}f}"


@dataclass(frozen=True)
class SideBySide:
    """Runs, their scores, and in what they differ.

    Args:
        runs: in the order given.
        rows: one a score.
        differences: conditions that are not the same in all runs, with what each run has.
        other_versions: packages whose versions differ, likewise.
        groups: runs that are one experiment with several seeds, in the order of the runs.
        made_differently: what the groups differ in, as far as manifests say it, with what each has.
    """

    runs: list[Run]
    rows: list[ScoreRow]
    differences: dict[str, list[str]]
    other_versions: dict[str, list[str]]
    groups: list[Group]
    made_differently: dict[str, list[str]]

    @property
    def repeated(self) -> list[int]:
        """Indices of the groups over which there is a mean."""
        return [i for i, group in enumerate(self.groups) if group.averaged]

    def group_notes(self) -> list[str]:
        """Say what means are over, and what they are not."""
        flawed = [
            f"{group.label}: there is no mean over these runs, as {group.flaw}."
            for group in self.groups
            if len(group.indices) > 1 and not group.averaged
        ]
        if not self.repeated:
            return flawed or [
                "There is no mean over these runs: no two of them have equal labels, or where no labels are "
                "given are known to be one experiment with other seeds. Equal labels say that runs are one."
            ]
        return [
            f"{group.label}: mean and standard deviation are over {len(group.indices)} runs {group.reason}."
            for group in map(self.groups.__getitem__, self.repeated)
        ] + flawed

    def _repr_html_(self) -> str:
        return in_frame(self.to_html())

    def cautions(self) -> list[str]:
        """Collect what has to be said of the scores, each once; what is of some runs alone names them."""
        return once({run.label: cautions(run.scores.values()) for run in self.runs})

    def to_markdown(self) -> str:
        """Return the content of comparison.md, a table to paste."""
        names = [
            *(run.label for run in self.runs),
            *(f"{self.groups[i].label}: mean ± std" for i in self.repeated),
        ]
        lines = [f"| score | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for row in self.rows:
            cells = [_cell(score, index in row.best) for index, score in enumerate(row.scores)]
            cells += [row.summary(i) for i in self.repeated]
            lines.append(f"| {row.name} | {' | '.join(cells)} |")
        if self.differences:
            lines += ["", "**These runs were not scored in the same way; their scores do not compare:**", ""]
            lines += [f"- {key}: {'; '.join(values)}" for key, values in self.differences.items()]
        if self.made_differently:
            lines += ["", "What the samples differ in:", ""]
            lines += [f"- {key}: {'; '.join(values)}" for key, values in self.made_differently.items()]
        lines += ["", *self.group_notes()]
        if said := self.cautions():
            lines += ["", *(f"- {caution}" for caution in said)]
        return "\n".join(lines) + "\n"

    def to_html(self) -> str:
        """Return the content of comparison.html, which needs no other file and no network.

        Raises:
            ImportError: when jinja2 is not installed.
        """
        return render(__package__, "comparison.html", folder="templates", table=self)

    def save(self, out: str | Path, *, overwrite: bool = False) -> None:
        """Write comparison.md and comparison.html to the folder ``out``.

        Raises:
            ValueError: when they are there and ``overwrite`` is false.
        """
        contents = map(encode, (self.to_markdown(), self.to_html()))
        write_together(out, dict(zip(FILE_NAMES, contents, strict=True)), overwrite=overwrite)


def _cell(score: Score | None, best: bool) -> str:
    if score is None:
        return "none"
    return f"**{score.text()}**" if best else score.text()


def compare_reports(reports: Sequence[str | Path], *, labels: Sequence[str] | None = None) -> SideBySide:
    """Put reports side by side.

    Runs whose samples were made in the same way, by models that differ in the seed of their training at most,
    are one group, and means are over the runs of a group.

    Args:
        reports: folders that ``Report.save`` wrote, or report.json files, two or more.
        labels: what each run is called; the part of its path in which they differ by default. Runs with equal
            labels are one group, whatever they are of.

    Raises:
        ValueError: when there are fewer, one is not a report of this version, or there is not a label each.
    """
    if len(reports) < 2:
        raise ValueError(f"two reports or more are compared, got {len(reports)}")
    if labels is not None and len(labels) != len(reports):
        raise ValueError(f"{len(labels)} labels for {len(reports)} reports: give one each, or none")
    paths = [Path(path) for path in reports]
    runs = tell_apart([load_run(*its) for its in zip(paths, labels or short_names(paths), strict=True)])
    groups = group_runs(runs, by_label=labels is not None)
    if differences := differing([run.conditions for run in runs]):
        groups = [replace(group, flaw="runs were not scored in the same way") for group in groups]
    names = dict.fromkeys(name for run in runs for name in run.scores)
    return SideBySide(
        runs=runs,
        rows=[_row(name, runs, groups, comparable=not differences) for name in names],
        differences=differences,
        other_versions=differing([run.versions for run in runs]),
        groups=groups,
        made_differently=differing([runs[group.indices[0]].made for group in groups]),
    )


def _row(name: str, runs: Sequence[Run], groups: Sequence[Group], *, comparable: bool) -> ScoreRow:
    scores = [run.scores.get(name) for run in runs]
    present = [score for score in scores if score is not None]
    best: list[int] = []
    if comparable:
        top = (max if present[0].higher_is_better else min)(present, key=lambda score: score.value)
        best = [i for i, score in enumerate(scores) if score is not None and _meets(score, top)]
    means = [_mean([scores[i] for i in group.indices]) if group.averaged else None for group in groups]
    return ScoreRow(name, scores, best=best if len(best) < len(present) else [], means=means)


def _mean(scores: Sequence[Score | None]) -> tuple[float, float] | None:
    values = [score.value for score in scores if score is not None]
    if len(values) < max(2, len(scores)):
        return None
    return float(np.mean(values)), float(np.std(values, ddof=1))


def _meets(score: Score, top: Score) -> bool:
    """Check that two intervals have a value in common; without intervals, that the values are equal."""
    low, high = score.interval or (score.value, score.value)
    top_low, top_high = top.interval or (top.value, top.value)
    return low <= top_high and top_low <= high
