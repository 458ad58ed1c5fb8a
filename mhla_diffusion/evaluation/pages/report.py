"""Report of an evaluation, as JSON for programs and as one self-contained page for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...files.pages import render
from ...files.writing import require_room, write_together
from ...optional import require
from ..scores.frechet import FeatureStatistics
from ..scores.score import Score, cautions
from ..sets.samples import SetSummary
from .notebook import in_frame
from .pictures import Neighbours, PictureRow
from .sentence import protocol_sentence

SCHEMA_VERSION = 2
FILE_NAMES = ("report.json", "report.md", "report.html", "samples.json")
SAMPLES = 12


@dataclass(frozen=True)
class Report:
    """Scores, the sets and the protocol they belong to, and some samples of both.

    Args:
        scores: one entry a metric.
        real, generated: the two sets.
        protocol: everything besides the samples that the scores depend on.
        pictures: rows of samples for the page.
        real_statistics: of the real samples, to be saved and given instead of them the next time.
        kind: what the sets are of, ``"image"`` or ``"video"``.
        neighbours: see :class:`Neighbours`; None when no score needed them.
    """

    scores: list[Score]
    real: SetSummary
    generated: SetSummary
    protocol: dict[str, Any]
    pictures: list[PictureRow]
    real_statistics: FeatureStatistics
    kind: str = "image"
    neighbours: Neighbours | None = None

    def __str__(self) -> str:
        lines = [*self.choices(), *map(str, self.scores)]
        return "\n".join([*lines, *(f"Caution: {said}" for said in cautions(self.scores))])

    def _repr_html_(self) -> str:
        return in_frame(self.to_html())

    def choices(self) -> list[str]:
        """Say which extractors were chosen for who asked for none, and why."""
        return [
            f"Extractor {name}, chosen {its['chosen']}."
            for name, its in self.protocol["extractors"].items()
            if "chosen" in its
        ]

    def sentence(self) -> str:
        """State the protocol in full, for a paper: scores, counts, extractors, sampler, versions."""
        return protocol_sentence(self.scores, self.real, self.generated, self.protocol, self.kind)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of report.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "scores": [asdict(score) for score in self.scores],
            "real": asdict(self.real),
            "generated": asdict(self.generated),
            "protocol": self.protocol,
            "median_realism": None if self.neighbours is None else self.neighbours.realism,
        }

    def to_markdown(self) -> str:
        """Return the content of report.md, a table to paste."""
        table = scores_table(
            self.scores, real=self.real.count, generated=self.generated.count, kind=self.kind
        )
        choices = "".join(f"{said}\n\n" for said in self.choices())
        return f"{choices}{table}\nProtocol: {self.sentence()}\n"

    def samples(self) -> list[dict[str, Any]]:
        """Return the content of samples.json: a few generated samples, of each class as many."""
        each = max(1, SAMPLES // len(self.pictures))
        return [
            {"label": row.label, **asdict(picture)}
            for row in self.pictures
            for picture in row.generated[:each]
        ]

    def to_html(self) -> str:
        """Return the content of report.html, which needs no other file and no network.

        Raises:
            ImportError: when jinja2 is not installed.
        """
        rest = {key: value for key, value in self.protocol.items() if key != "extractors"}
        return render(
            __package__, "report.html", folder="templates",
            report=self, cautions=cautions(self.scores), rest=rest,
        )  # fmt: skip

    def save(self, out: str | Path, *, overwrite: bool = False) -> None:
        """Write the report to the folder ``out``, made when it is not there.

        report.json for programs, report.md to paste, report.html to read, samples.json for comparisons.

        Raises:
            ValueError: when ``out`` holds a report and ``overwrite`` is false.
            ImportError: when jinja2 is not installed.
        """
        require_no_report(out, overwrite=overwrite)
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        contents = (text, self.to_markdown(), self.to_html(), json.dumps(self.samples()))
        encoded = dict(zip(FILE_NAMES, map(encode, contents), strict=True))
        write_together(out, encoded, overwrite=overwrite)


def scores_table(scores: Sequence[Score], *, real: int | None, generated: int | None, kind: str) -> str:
    """Return Markdown: a row a score with its interval, then what has to be said of them."""
    lines = ["| score | value [95 % interval] | N to infinity | |", "|---|---|---|---|"]
    for score in scores:
        limit = "" if score.extrapolated is None else score.format(score.extrapolated)
        better = "higher is better" if score.higher_is_better else "lower is better"
        lines.append(f"| {score.name} | {score.text()} | {limit} | {better} |")
    counts = ["an unstated number of" if count is None else f"{count:,}" for count in (generated, real)]
    lines += ["", f"{counts[0]} generated against {counts[1]} real {kind}s.", ""]
    lines += [f"- {said}" for said in cautions(scores)]
    return "\n".join(lines).rstrip() + "\n"


def encode(text: str) -> bytes:
    """Return text in UTF-8; of names of files that are no text, the bytes are written out."""
    return text.encode("utf-8", "backslashreplace")


def require_no_report(out: str | Path, *, overwrite: bool = False) -> None:
    """Check, before hours are spent, that ``Report.save(out)`` will find its place free.

    A report that is only in part written, as its process was killed, may be written again.

    Raises:
        ValueError: when ``out`` holds a report and ``overwrite`` is false, is no folder or cannot be written.
        ImportError: when jinja2 is not installed.
    """
    require("jinja2")
    require_room(out, FILE_NAMES, overwrite=overwrite)
