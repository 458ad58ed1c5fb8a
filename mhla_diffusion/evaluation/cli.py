"""The command line: ``mhla-evaluate``, or ``python scripts/evaluate.py`` in a copy of the repository."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Any

from ..optional import require
from ..processes import in_first_process
from .evaluate import compute_statistics, evaluate_images, evaluate_videos
from .pages.comparison import compare_reports
from .pages.report import Report, require_no_report
from .scores.frechet import require_new_npz
from .sets.vbench import export_vbench

logger = logging.getLogger(__name__)


def image(out: str, save_stats: str | None = None, overwrite: bool = False, **evaluation: Any) -> None:
    """Score generated images against real ones.

    Args:
        out: folder for report.json, report.md, report.html and samples.json.
        save_stats: npz to which the statistics of the real images are written too.
        overwrite: replace a report or statistics that are already there.
    """
    _require_room(out, save_stats, overwrite)
    _save(evaluate_images(**evaluation), out, save_stats, overwrite)


def video(out: str, save_stats: str | None = None, overwrite: bool = False, **evaluation: Any) -> None:
    """Score generated videos against real ones.

    Args:
        out: folder for report.json, report.md, report.html and samples.json.
        save_stats: npz to which the statistics of the real videos are written too.
        overwrite: replace a report or statistics that are already there.
    """
    _require_room(out, save_stats, overwrite)
    _save(evaluate_videos(**evaluation), out, save_stats, overwrite)


def stats(out: str, overwrite: bool = False, **computation: Any) -> None:
    """Write the statistics of a set of images, to be given as ``--real`` from then on.

    Args:
        out: npz with mu and sigma, and mu_s and sigma_s when the extractor gives spatial features.
        overwrite: replace statistics that are already there.
    """
    require_new_npz(out, overwrite=overwrite)
    statistics = compute_statistics(**computation)
    in_first_process(lambda: statistics.save(out, overwrite=overwrite))
    logger.info("Statistics: %s", out)


def compare(reports: list[str], out: str, overwrite: bool = False) -> None:
    """Put reports side by side, as comparison.md and comparison.html.

    Args:
        reports: folders of two reports or more.
        out: folder for the comparison.
        overwrite: replace a comparison that is already there.
    """
    table = compare_reports(reports)
    table.save(out, overwrite=overwrite)
    logger.info("%s", table.to_markdown())
    logger.info("Comparison: %s", Path(out) / "comparison.html")


def vbench(generated: str, out: str) -> None:
    """Copy generated videos into the layout that VBench reads.

    Args:
        generated: folder of scripts/generate.py, with its manifest.json.
        out: folder that is not there yet.
    """
    logger.info("%d videos in %s", export_vbench(generated, out), out)


def main() -> None:
    """Parse and run; what a user got wrong is one line and status 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    commands = {"image": image, "video": video, "stats": stats, "compare": compare, "vbench": vbench}
    try:
        require("jsonargparse").auto_cli(
            commands, args=_with_list(sys.argv[1:]), as_positional=False, allow_abbrev=False
        )
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


def _with_list(arguments: list[str]) -> list[str]:
    """``compare A B C --out D`` as ``compare --reports [A, B, C] --out D``."""
    if arguments[:1] != ["compare"]:
        return arguments
    count = next((i for i, word in enumerate(arguments[1:]) if word.startswith("--")), len(arguments) - 1)
    reports = arguments[1 : count + 1]
    return ["compare", *(["--reports", str(reports)] if reports else []), *arguments[count + 1 :]]


def _require_room(out: str, save_stats: str | None, overwrite: bool) -> None:
    require_no_report(out, overwrite=overwrite)
    if save_stats:
        require_new_npz(save_stats, overwrite=overwrite)


def _save(report: Report, out: str, save_stats: str | None, overwrite: bool) -> None:
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    report.protocol["command"] = shlex.join(sys.argv)
    report.save(out, overwrite=overwrite)
    if save_stats:
        report.real_statistics.save(save_stats, overwrite=overwrite)
    logger.info("Report: %s", Path(out) / "report.html")
