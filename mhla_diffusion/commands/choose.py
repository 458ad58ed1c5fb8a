"""``mhla choose``: the form of each aligned layer, of least error within a budget, and the student."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch

from .parsing import parse_and_call


def choose(
    aligned: str,
    budget: float,
    height: int,
    width: int,
    data: str,
    out: str,
    frames: int | None = None,
    vae_stride: int | None = None,
    keep: Sequence[int] = (0,),
    cost: Literal["flops", "latency"] = "flops",
    check: int = 8,
    repairs: int = 20,
    model: str | None = None,
    component: str = "transformer",
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
) -> None:
    """Choose the form of each layer, check it on the assembled model, and write the student.

    Args:
        aligned: folder of mhla align.
        budget: most cost of self-attention, without its projections, as a share of the teacher's.
        height: of the output in pixels that costs are for.
        width: of the output in pixels that costs are for.
        data: of the check, as for mhla align.
        out: a folder that does not exist yet: a pipeline, with choice.json beside its parts.
        frames: of the output, for video models.
        vae_stride: pixels for one latent; by default that of the pipeline's own autoencoder. Models of pixels
            have 1.
        keep: layers that stay as they are; a negative number counts from the last.
        cost: FLOPs, or latency measured here.
        check: calls that assembled models are measured on, 0 for no check.
        repairs: models that a greedy repair may measure, where layers' errors do not predict the model's.
        model: teacher, if it is no longer where it was aligned.
        component: of the pipeline: Wan2.2 has transformer and transformer_2.
        dtype: of the student.
        seed: of the calls.
    """
    from ..conversion import choose as run
    from ..conversion import load_teacher, open_calls
    from ..conversion.align import read_aligned
    from ..conversion.choose import save_student
    from ..files.writing import require_new_folder
    from ..hub import expert_times
    from ..planning import plan
    from ..processes import in_first_process, one_fate, process_state

    logging.getLogger("mhla_diffusion.backbones.rebuild").setLevel(logging.WARNING)
    in_first_process(lambda: require_new_folder(out))
    path = model or read_aligned(aligned)["model"]
    teacher = load_teacher(
        path, component=component, dtype=getattr(torch, dtype), device=process_state().device
    )
    size = plan(path, height, width, frames, vae_stride=vae_stride)
    calls = open_calls(teacher, data, seed=seed, times=expert_times(path, component))

    def make() -> None:
        student, facts = run(
            teacher, calls, aligned, size, budget=budget, keep=keep, cost=cost, check=check, repairs=repairs
        )
        save_student(student, facts, path, out, component=component)
        logging.info("student: %s", out)

    with one_fate():
        in_first_process(make)


def main(arguments: Sequence[str], prog: str) -> None:
    """Choose."""
    parse_and_call(choose, arguments, prog)
