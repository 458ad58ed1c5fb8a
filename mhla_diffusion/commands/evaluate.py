"""``mhla evaluate``, also ``mhla-evaluate``: scores of images and videos, and comparisons."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..evaluation import Report, compare_reports, compute_statistics, evaluate_images, evaluate_videos
from ..evaluation.pages.report import require_no_report
from ..evaluation.scores.frechet import require_new_npz
from ..evaluation.sets.benchmarks import export_benchmark, write_prompts
from ..evaluation.sets.vbench import export_vbench
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
        generated: folder of mhla generate, with its manifest.json.
        out: folder that is not there yet.
    """
    logger.info("%d videos in %s", export_vbench(generated, out), out)


def prompts(benchmark: str, source: str, out: str) -> None:
    """Write the prompts of a benchmark of text to image as a CSV file for mhla generate image --prompts.

    Args:
        benchmark: mjhq30k, geneval, geneval2 or dpg_bench.
        source: its own file or folder of prompts: meta_data.json, evaluation_metadata.jsonl,
            geneval2_data.jsonl, or the folder prompts.
        out: the CSV file, which is not there yet.
    """
    logger.info("%d prompts in %s", write_prompts(benchmark, source, out), out)


def layout(benchmark: str, source: str, generated: str, out: str) -> None:
    """Copy generated images into the layout that a benchmark of text to image reads.

    Args:
        benchmark: mjhq30k, geneval, geneval2 or dpg_bench.
        source: as for mhla evaluate prompts.
        generated: folder of mhla generate, from these prompts.
        out: folder that is not there yet.
    """
    logger.info("images of %d prompts in %s", export_benchmark(benchmark, source, generated, out), out)


def main(arguments: Sequence[str], prog: str, name: str) -> None:
    """Score, or do what else there is."""
    commands: dict[str, Callable[..., Any]] = {
        "image": image,
        "video": video,
        "stats": stats,
        "compare": compare,
        "vbench": vbench,
        "prompts": prompts,
        "layout": layout,
    }
    parse_and_call(commands[name], _with_list(arguments) if name == "compare" else arguments, prog)


def _with_list(arguments: Sequence[str]) -> list[str]:
    """Return ``A B C --out D`` as ``--reports [A, B, C] --out D``."""
    count = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    reports = list(arguments[:count])
    return [*(["--reports", str(reports)] if reports else []), *arguments[count:]]


def _require_room(out: str, save_stats: str | None, overwrite: bool) -> None:
    require_no_report(out, overwrite=overwrite)
    if save_stats:
        require_new_npz(save_stats, overwrite=overwrite)


def _save(report: Report, out: str, save_stats: str | None, overwrite: bool) -> None:
    def save() -> None:
        report.protocol["command"] = shlex.join(sys.argv)
        report.save(out, overwrite=overwrite)
        if save_stats:
            report.real_statistics.save(save_stats, overwrite=overwrite)
        logger.info("Report: %s", Path(out) / "report.html")

    in_first_process(save)
