"""What an evaluation found, as JSON for programs and as one self-contained page for people."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from .frechet import FeatureStatistics
from .grid import Picture
from .optional import require
from .output import require_absent, write_atomically

SCHEMA_VERSION = 1
FILE_NAMES = ("report.json", "report.html")


@dataclass(frozen=True)
class Score:
    """A number, what it is called, and everything that has to be said whenever it is shown."""

    name: str
    value: float
    flags: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        flags = f" ({' '.join(self.flags)})" if self.flags else ""
        return f"{self.name} = {self.value:.4f}{flags}"


@dataclass(frozen=True)
class SkippedFile:
    """A file that could not be read, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class SetSummary:
    """What was scored.

    Args:
        source: folder or file.
        count: samples that were scored; None when statistics do not state it.
        fingerprint: hash of these samples; None when statistics do not state it.
        skipped: files that could not be read.
        unlisted: samples in the folder that its manifest does not list, and that were left out.
        manifest: what the manifest says of the whole set.
    """

    source: str
    count: int | None
    fingerprint: str | None
    skipped: list[SkippedFile] = field(default_factory=list)
    unlisted: int = 0
    manifest: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PictureRow:
    """Real and generated samples of one class, or of the whole sets (``label`` None)."""

    label: str | None
    real: list[Picture]
    generated: list[Picture]


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
    """

    scores: list[Score]
    real: SetSummary
    generated: SetSummary
    protocol: dict[str, Any]
    pictures: list[PictureRow]
    real_statistics: FeatureStatistics
    kind: str = "image"

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "scores": [asdict(score) for score in self.scores],
            "real": asdict(self.real),
            "generated": asdict(self.generated),
            "protocol": self.protocol,
        }

    def to_html(self) -> str:
        """The content of report.html, which needs no other file and no network.

        Raises:
            ImportError: when jinja2 is not installed.
        """
        environment = require("jinja2").Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(files(__package__).joinpath("report.html").read_text("utf-8"))
        return template.render(report=self)

    def save(self, out: str | Path, *, overwrite: bool = False) -> None:
        """Write report.json and report.html to the folder ``out``, which is made when it is not there.

        Raises:
            ValueError: when ``out`` holds a report and ``overwrite`` is false.
            ImportError: when jinja2 is not installed.
        """
        require_no_report(out, overwrite=overwrite)
        contents = (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", self.to_html())
        for name, content in zip(FILE_NAMES, contents, strict=True):
            write_atomically(Path(out) / name, content.encode("utf-8"))


def require_no_report(out: str | Path, *, overwrite: bool = False) -> None:
    """Check, before hours are spent, that ``Report.save(out)`` will find its place free.

    Raises:
        ValueError: when ``out`` holds a report and ``overwrite`` is false, or is no folder.
    """
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"{out} is a file; a report needs a folder")
    require_absent([Path(out) / name for name in FILE_NAMES], overwrite=overwrite)
