"""``mhla evaluate``, also ``mhla-evaluate``: scores of images and videos, and comparisons."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..evaluation import Report, compare_reports, compute_statistics, evaluate_images, evaluate_videos
from ..evaluation.pages.report import require_no_report
from ..evaluation.scores.frechet import require_new_npz
from ..evaluation.sets.vbench import export_vbench
from ..files.locking import only_writer
from ..processes import in_first_process
from .parsing import parse_and_call

logger = logging.getLogger(__name__)


def image(out: str, save_stats: str | None = None, overwrite: bool = False, **evaluation: Any) -> None:
    """Score generated images against real ones.

    Args:
        out: folder for report.json, report.md, report.html and samples.json.
        save_stats: npz to which the statistics of the real images are written too.
        overwrite: replace a report or statistics that are already there.
    """
    with _room(out, save_stats, overwrite):
        _save(evaluate_images(**evaluation), out, save_stats, overwrite)


def video(out: str, save_stats: str | None = None, overwrite: bool = False, **evaluation: Any) -> None:
    """Score generated videos against real ones.

    Args:
        out: folder for report.json, report.md, report.html and samples.json.
        save_stats: npz to which the statistics of the real videos are written too.
        overwrite: replace a report or statistics that are already there.
    """
    with _room(out, save_stats, overwrite):
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
        generated: folder of mhla generate, with its manifest.json.
        out: folder that is not there yet.
    """
    logger.info("%d videos in %s", export_vbench(generated, out), out)


def main(arguments: Sequence[str], prog: str, name: str) -> None:
    """Score, or do what else there is."""
    commands: dict[str, Callable[..., Any]] = {
        "image": image,
        "video": video,
        "stats": stats,
        "compare": compare,
        "vbench": vbench,
    }
    parse_and_call(commands[name], _with_list(arguments) if name == "compare" else arguments, prog)


def _with_list(arguments: Sequence[str]) -> list[str]:
    """Return ``A B C --out D`` as ``--reports [A, B, C] --out D``."""
    count = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    reports = list(arguments[:count])
    return [*(["--reports", str(reports)] if reports else []), *arguments[count:]]


@contextmanager
def _room(out: str, save_stats: str | None, overwrite: bool) -> Iterator[None]:
    """Check, before the work, that what it gives can be written, and keep the place."""
    with ExitStack() as stack:

        def enter() -> None:
            require_no_report(out, overwrite=overwrite)
            if save_stats:
                require_new_npz(save_stats, overwrite=overwrite)
            stack.enter_context(only_writer(out))

        in_first_process(enter)
        yield


def _save(report: Report, out: str, save_stats: str | None, overwrite: bool) -> None:
    def save() -> None:
        report.protocol["command"] = shlex.join(sys.argv)
        report.save(out, overwrite=overwrite)
        if save_stats:
            report.real_statistics.save(save_stats, overwrite=overwrite)
        logger.info("Report: %s", Path(out) / "report.html")

    in_first_process(save)
