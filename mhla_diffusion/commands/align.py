"""``mhla align``: train each layer of a teacher alone, in every candidate form, to give the same output."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch

from ..conversion.job import AlignConfig
from .parsing import parse_and_call


def align(
    model: str,
    data: str,
    out: str,
    candidates: str | None = None,
    layers: Sequence[int] | None = None,
    settings: AlignConfig = AlignConfig(),  # noqa: B008 (frozen)
    component: str = "transformer",
    grid: Sequence[int] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
) -> None:
    """Align every layer of a teacher in every candidate form; interrupted, it goes on where it stopped.

    Several processes (accelerate launch, torchrun) share the layers.

    Args:
        model: teacher, folder or hub id of a transformer that has an MHLA form, or of its pipeline.
        data: YAML of a training run, whose data, conditions and objective are taken; samples (samples-ddpm),
            the teacher's own; or noise.
        out: folder; candidates may be added to what it holds.
        candidates: YAML that maps names to settings of MHLA; by default linear attention, MHLA, and MHLA with
            a softmax window, all with learned features.
        layers: to align, by number; all by default.
        settings: of the training of layers.
        component: of the pipeline: Wan2.2 has transformer and transformer_2.
        grid: tokens along each axis, for samples and noise; the model's own by default.
        dtype: of the teacher.
        seed: of the calls.
    """
    from ..conversion import align as run
    from ..conversion import load_candidates, load_teacher, open_calls
    from ..hub import expert_times
    from ..processes import process_state

    logging.getLogger("mhla_diffusion.backbones.rebuild").setLevel(logging.WARNING)
    forms = None if candidates is None else load_candidates(candidates)
    teacher = load_teacher(
        model, component=component, dtype=getattr(torch, dtype), device=process_state().device
    )
    calls = open_calls(
        teacher, data, seed=seed, grid=None if grid is None else tuple(grid),
        times=expert_times(model, component),
    )  # fmt: skip
    run(teacher, calls, out, candidates=forms, config=settings, name=model, layers=layers)
    logging.info("aligned layers: %s", out)


def main(arguments: Sequence[str], prog: str) -> None:
    """Align."""
    parse_and_call(align, arguments, prog)
