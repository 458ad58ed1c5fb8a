"""``mhla analyze``: rank, entropy and mixing of a model's attention."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ..files.writing import require_room
from ..optional import require
from .parsing import parse_and_call


def report(
    model: str,
    out: str,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    timestep: int = 500,
    batch_size: int = 2,
    seed: int = 0,
    max_tokens: int = 4096,
    overwrite: bool = False,
) -> None:
    """Write report.html and report.json about the attention of a transformer, on noise.

    Args:
        model: folder or hub id of a transformer that has an MHLA form, stock or ours, or of its pipeline.
        out: folder for the report.
        height: of the latents; the model's own by default.
        width: of the latents; the height by default.
        frames: of the latents, for models of videos; the model's own by default.
        timestep: 0 to 999.
        batch_size: samples, of random conditions.
        seed: of the latents and conditions.
        max_tokens: of a layer; more are refused, as its matrices take 8 N^2 bytes each.
        overwrite: replace a report that is already there.
    """
    # Here, as diffusers takes seconds that ``--help`` has no need of.
    from ..analysis import FILE_NAMES, analyze_stored

    require("jinja2")
    require_room(out, FILE_NAMES, overwrite=overwrite)
    analysis = analyze_stored(
        model, height=height, width=width, frames=frames, timestep=timestep, batch_size=batch_size, seed=seed,
        max_tokens=max_tokens,
    )  # fmt: skip
    analysis.save(out, overwrite=overwrite)
    logging.info("Report: %s", Path(out) / "report.html")


def main(arguments: Sequence[str], prog: str) -> None:
    """Write the report."""
    parse_and_call(report, arguments, prog)
