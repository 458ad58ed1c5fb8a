"""``mhla report``: pages about models that were made here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ..conversion.report import ReportConfig
from .parsing import parse_and_call


def conversion(
    teacher: str,
    students: Sequence[str],
    data: str,
    out: str,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    vae_stride: int | None = None,
    settings: ReportConfig = ReportConfig(),  # noqa: B008 (frozen)
    component: str = "transformer",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Write report.html and report.json: a teacher, and its students plain, aligned and distilled.

    Args:
        teacher: folder or hub id.
        students: folders of mhla choose, or of training runs, at least one.
        data: as for mhla align.
        out: folder; models that were measured into it are not measured again.
        height: of the output in pixels that speed and memory are for; none are measured by default.
        width: of the output in pixels.
        frames: of the output, for video models.
        vae_stride: pixels for one latent; by default that of the pipeline's own autoencoder. Models of pixels
            have 1.
        settings: of the report.
        component: of the pipeline.
        dtype: of the models, that of the alignment.
    """
    from ..conversion.report import report
    from ..planning import plan

    if (height is None) != (width is None):
        raise ValueError(f"height and width go together, got {height} and {width}")
    size = None
    if height is not None and width is not None:
        size = plan(teacher, height, width, frames, vae_stride=vae_stride)
    report(
        teacher, students, data, out, size=size, config=settings, component=component,
        dtype=getattr(torch, dtype),
    )  # fmt: skip


def main(arguments: Sequence[str], prog: str, kind: str) -> None:
    """Write a report of a kind."""
    parse_and_call({"conversion": conversion}[kind], arguments, prog)
