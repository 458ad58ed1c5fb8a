"""Several reports side by side: their scores, and whether they may be compared at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...files.pictures import PICTURE_CONVERSION, VIDEO_CONVERSION, WHITE
from ...files.writing import write_together
from ..scores.score import Score, cautions, decimals, once
from ..sets.samples import EARLIER_CONVERSIONS
from .report import SCHEMA_VERSION, encode, render

FILE_NAMES = ("comparison.md", "comparison.html")

# What differs from run to run without changing what is measured.
_HARMLESS = ("date", "command", "device", "batch_size", "versions", "intervals")
# Reports of earlier versions: where pixels became others, the fingerprint of the real set is another.
_RENAMED = {
    EARLIER_CONVERSIONS[kind]: text.format(background=WHITE)
    for kind, text in (("image", PICTURE_CONVERSION), ("video", VIDEO_CONVERSION))
}


@dataclass(frozen=True)
class Run:
    """Report that is compared.

    Args:
        name: the path that was given.
        scores: by name.
        conditions: everything that must be equal in two runs that are compared, by a dotted key.
        versions: of the packages.
        kind: ``"image"`` or ``"video"``.
        samples: a few generated ones, as they stand in samples.json; none when that is not there.
    """

    name: str
    scores: dict[str, Score]
    conditions: dict[str, str]
    versions: dict[str, str]
    kind: str
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class ScoreRow:
    """Score in all runs; None where a run has it not.

    Args:
        name: of the score.
        scores: one a run.
        best: indices of the best runs: those whose interval meets that of the best value.
        mean, std: over the runs, as over seeds; None when a run has it not, or runs may not be compared.
    """

    name: str
    scores: list[Score | None]
    best: list[int]
    mean: float | None
    std: float | None

    def summary(self) -> str:
        """Format mean and standard deviation over the runs; empty when they are None."""
        if self.mean is None or self.std is None:
            return ""
        places = decimals(self.std)
        return f"{self.mean:.{places}f} ± {self.std:.{places}f}"


@dataclass(frozen=True)
class SideBySide:
    """Runs, their scores, and in what they differ.

    Args:
        runs: in the order given.
        rows: one a score.
        differences: conditions that are not the same in all runs, with what each run has.
        other_versions: packages whose versions differ, likewise.
    """

    runs: list[Run]
    rows: list[ScoreRow]
    differences: dict[str, list[str]]
    other_versions: dict[str, list[str]]

    def cautions(self) -> list[str]:
        """Collect what has to be said of the scores, each once; what is of some runs alone names them."""
        return once({run.name: cautions(run.scores.values()) for run in self.runs})

    def to_markdown(self) -> str:
        """Return the content of comparison.md, a table to paste."""
        names = [run.name for run in self.runs]
        lines = [f"| score | {' | '.join(names)} | mean ± std |", "|---" * (len(names) + 2) + "|"]
        for row in self.rows:
            cells = [_cell(score, index in row.best) for index, score in enumerate(row.scores)]
            lines.append(f"| {row.name} | {' | '.join(cells)} | {row.summary()} |")
        if self.differences:
            lines += ["", "**These runs were not scored in the same way; their scores do not compare:**", ""]
            lines += [f"- {key}: {'; '.join(values)}" for key, values in self.differences.items()]
        if said := self.cautions():
            lines += ["", *(f"- {caution}" for caution in said)]
        return "\n".join(lines) + "\n"

    def to_html(self) -> str:
        """Return the content of comparison.html, which needs no other file and no network.

        Raises:
            ImportError: when jinja2 is not installed.
        """
        return render("comparison.html", table=self)

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


def compare_reports(reports: Sequence[str | Path]) -> SideBySide:
    """Put reports side by side.

    Args:
        reports: folders that ``Report.save`` wrote, or report.json files, two or more.

    Raises:
        ValueError: when there are fewer, or one is not a report of this version.
    """
    if len(reports) < 2:
        raise ValueError(f"two reports or more are compared, got {len(reports)}")
    runs = [_load(Path(path)) for path in reports]
    differences = _differing([run.conditions for run in runs])
    names = dict.fromkeys(name for run in runs for name in run.scores)
    return SideBySide(
        runs=runs,
        rows=[_row(name, runs, comparable=not differences) for name in names],
        differences=differences,
        other_versions=_differing([run.versions for run in runs]),
    )


def _load(path: Path) -> Run:
    file = path / "report.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text("utf-8"))
        version = content["schema_version"]
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"it has schema_version {version}, not {SCHEMA_VERSION}: score the samples again"
            )
        protocol = content["protocol"]
        conditions = {key: value for key, value in protocol.items() if key not in (*_HARMLESS, "scores")}
        real, generated = content["real"], content["generated"]
        conditions["conversion"] = _RENAMED.get(conditions["conversion"], conditions["conversion"])
        conditions |= {
            "kind": content["kind"],
            "real": {"count": real["count"], "fingerprint": real["fingerprint"]},
            "generated": {"count": generated["count"]},
        }
        scores = [Score(**score) for score in content["scores"]]
        pictures = file.with_name("samples.json")
        samples = json.loads(pictures.read_text("utf-8")) if pictures.is_file() else []
        if not all(map(_is_sample, samples)) or not all(map(_is_score, scores)):
            raise ValueError("it has been changed: score the samples again")
        versions = dict(protocol["versions"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not a report that can be compared: {error}") from error
    return Run(
        name=str(path),
        scores={score.name: score for score in scores},
        conditions=_flat(conditions),
        versions=versions,
        kind=content["kind"],
        samples=samples,
    )


def _is_sample(sample: Any) -> bool:
    """Check what goes into a page: a report may come from a stranger."""
    picture, sizes = sample.get("data_uri"), [sample.get(name) for name in ("width", "height")]
    texts = [sample.get(name) or "" for name in ("name", "label", "prompt")]
    inline = isinstance(picture, str) and picture.startswith("data:image/")
    return inline and all(type(size) is int for size in sizes) and all(isinstance(t, str) for t in texts)


def _is_score(score: Score) -> bool:
    numbers = [score.value, *(score.interval or ())]
    return (
        isinstance(score.name, str)
        and isinstance(score.extractor, str)
        and all(isinstance(number, int | float) for number in numbers)
        and len(score.interval or (0, 0)) == 2
        and all(isinstance(flag, str) for flag in score.flags)
    )


def _row(name: str, runs: Sequence[Run], *, comparable: bool) -> ScoreRow:
    scores = [run.scores.get(name) for run in runs]
    present = [score for score in scores if score is not None]
    values = np.array([score.value for score in present])
    whole = comparable and len(present) == len(runs)
    best: list[int] = []
    if comparable:
        top = (max if present[0].higher_is_better else min)(present, key=lambda score: score.value)
        best = [i for i, score in enumerate(scores) if score is not None and _meets(score, top)]
    return ScoreRow(
        name,
        scores,
        best=best if len(best) < len(runs) else [],
        mean=float(values.mean()) if whole else None,
        std=float(values.std(ddof=1)) if whole else None,
    )


def _meets(score: Score, top: Score) -> bool:
    """Check that two intervals have a value in common; without intervals, that the values are equal."""
    low, high = score.interval or (score.value, score.value)
    top_low, top_high = top.interval or (top.value, top.value)
    return low <= top_high and top_low <= high


def _differing(conditions: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    keys = dict.fromkeys(key for its in conditions for key in its)
    found = {key: [its.get(key, "(absent)") for its in conditions] for key in keys}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def _flat(value: Any, key: str = "") -> dict[str, str]:
    if not isinstance(value, dict):
        return {key: str(value)}
    flat: dict[str, str] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{key}.{name}" if key else name)
    return flat
