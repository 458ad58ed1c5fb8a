"""Score generated images or videos: python scripts/evaluate.py image --real DIR --generated DIR --out DIR"""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from mhla_diffusion.evaluation import Report, evaluate_images, evaluate_videos
from mhla_diffusion.evaluation.frechet import require_new_npz
from mhla_diffusion.evaluation.report import require_no_report


def image(out: str, save_stats: str | None = None, overwrite: bool = False, **evaluation: Any) -> None:
    """Frechet distance between two sets of images, written as report.json and report.html.

    Args:
        out: folder for the report.
        save_stats: npz to which the statistics of the real images are written too.
        overwrite: replace a report or statistics that are already there.
    """
    _require_room(out, save_stats, overwrite)
    _save(evaluate_images(**evaluation), out, save_stats, overwrite)


def video(out: str, save_stats: str | None = None, overwrite: bool = False, **evaluation: Any) -> None:
    """Frechet distance between two sets of videos, written as report.json and report.html.

    Args:
        out: folder for the report.
        save_stats: npz to which the statistics of the real videos are written too.
        overwrite: replace a report or statistics that are already there.
    """
    _require_room(out, save_stats, overwrite)
    _save(evaluate_videos(**evaluation), out, save_stats, overwrite)


def _require_room(out: str, save_stats: str | None, overwrite: bool) -> None:
    require_no_report(out, overwrite=overwrite)
    if save_stats:
        require_new_npz(save_stats, overwrite=overwrite)


def _save(report: Report, out: str, save_stats: str | None, overwrite: bool) -> None:
    report.protocol["command"] = shlex.join(sys.argv)
    report.save(out, overwrite=overwrite)
    if save_stats:
        report.real_statistics.save(save_stats, overwrite=overwrite)
    logging.info("Report: %s", Path(out) / "report.html")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        auto_cli({"image": image, "video": video}, as_positional=False, allow_abbrev=False)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
