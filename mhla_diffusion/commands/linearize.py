"""``mhla linearize``: a softmax model into an MHLA model: align, choose, distil, report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from ..conversion.linearize import LinearizeConfig
from .parsing import parse_and_call


def linearize(
    model: str,
    data: str,
    out: str,
    height: int,
    width: int,
    frames: int | None = None,
    vae_stride: int | None = None,
    settings: LinearizeConfig = LinearizeConfig(),  # noqa: B008 (frozen)
    candidates: str | None = None,
    component: str = "transformer",
    grid: Sequence[int] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    plan_only: bool = False,
    planned_as: str | None = None,
    gpus: int = 1,
    tflops: float = 300.0,
) -> int:
    """Convert a softmax model: align its layers, choose among their forms, distil, and report.

    The folder gets aligned, student, distilled and report. Stopped anywhere, the same command goes on.

    Args:
        model: teacher, folder or hub id of a transformer that has an MHLA form, or of its pipeline.
        data: YAML of a training run, whose data, conditions and objective are taken; samples (samples-ddpm),
            the teacher's own, or noise: then there is no distillation.
        out: folder.
        height: of the output in pixels, that costs, speed and memory are for.
        width: of the output in pixels.
        frames: of the output, for video models.
        vae_stride: pixels for one latent; by default that of the stock model's autoencoder. Models of pixels
            have 1.
        settings: of the stages.
        candidates: YAML that maps names to settings of MHLA; by default linear attention, MHLA, and MHLA with
            a softmax window, all with learned features.
        component: of the pipeline: Wan2.2 has transformer and transformer_2.
        grid: tokens along each axis, for data samples and noise; the model's own by default.
        dtype: of the teacher in alignment, and of the student.
        plan_only: print bytes, memory and GPU-hours, and do nothing. Without a run, and a batch size of the
            settings, distillation is of 256 samples a step.
        planned_as: what the plan takes the model for, such as DiT-XL/2, where it is not at hand.
        gpus: of the plan.
        tflops: of the plan, sustained by a GPU.
    """
    from ..conversion import default_candidates, load_candidates
    from ..conversion.budget import conversion_budget
    from ..conversion.linearize import linearize as run
    from ..planning import plan

    size = plan(planned_as or model, height, width, frames, vae_stride=vae_stride)
    forms = None if candidates is None else load_candidates(candidates)
    if plan_only:
        budget = conversion_budget(
            size, forms or default_candidates(size.layout.grid), settings.align, steps=settings.steps,
            batch_size=settings.batch_size or _batch_size_of(data) or 256, distillation=settings.distillation,
            gpus=gpus, tflops=tflops,
        )  # fmt: skip
        print(budget)
        return 0
    for library in ("mhla_diffusion.backbones.rebuild", "accelerate"):
        logging.getLogger(library).setLevel(logging.WARNING)
    stopped = run(
        model, data, out, size, config=settings, candidates=forms, dtype=getattr(torch, dtype),
        grid=None if grid is None else tuple(grid), component=component,
    )  # fmt: skip
    return 128 + stopped if stopped else 0


def _batch_size_of(data: str) -> int | None:
    """Return the batch size of a training run, which need not be of a model that is at hand; None of none."""
    from ..training.export import read_run_config

    return read_run_config(data).trainer.batch_size if Path(data).is_file() else None


def main(arguments: Sequence[str], prog: str) -> int:
    """Return the exit code of a conversion."""
    return parse_and_call(linearize, arguments, prog)
