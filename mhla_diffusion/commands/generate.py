"""Generate images or videos into a folder: files and manifest.json.

    accelerate launch scripts/generate.py image --model DIR --num 1000 --out DIR
    accelerate launch scripts/generate.py video --model DIR --prompts "[a red car]" --out DIR

Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from mhla_diffusion.pipelines.generation import generate_images, generate_videos, save_grid, save_strips

from .. import MHLAPipeline
from .parsing import parse_and_call

DType = Literal["float32", "bfloat16", "float16"]


def image(
    model: str,
    out: str,
    num: int,
    classes: list[int | str] | None = None,
    batch_size: int = 32,
    steps: int = 50,
    guidance: float = 4.0,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    dtype: DType = "float32",
    grid: str | None = None,
) -> None:
    """Generate images of classes: PNG files and manifest.json.

    Args:
        model: folder or hub id of a pipeline.
        out: a new folder, or that of an unfinished run.
        num: number of images.
        classes: class ids or names to go through; all by default.
        batch_size: images at a time in one process.
        steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 for none.
        seed: of the first image; image i has seed + i.
        height: in pixels; the training size by default.
        width: in pixels; the training size by default.
        dtype: of the weights.
        grid: also draw the first images, a column for each class, into this PNG file.
    """
    manifest = generate_images(
        load(model, dtype, "class_labels"), out, num_images=num, class_labels=classes, seed=seed,
        batch_size=batch_size, num_inference_steps=steps, guidance_scale=guidance, height=height, width=width,
    )  # fmt: skip
    if grid is not None:
        save_grid(manifest.parent, grid)


def video(
    model: str,
    out: str,
    prompts: list[str],
    num: int | None = None,
    batch_size: int = 4,
    steps: int = 50,
    guidance: float = 5.0,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    dtype: DType = "float32",
    strip: str | None = None,
) -> None:
    """Generate videos of texts: MP4 files and manifest.json.

    Args:
        model: folder or hub id of a pipeline.
        out: a new folder, or that of an unfinished run.
        prompts: texts to go through.
        num: number of videos; one for each prompt by default.
        batch_size: videos at a time in one process.
        steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 for none.
        seed: of the first video; video i has seed + i.
        height: in pixels; the training size by default.
        width: in pixels; the training size by default.
        frames: number of frames; that of the training by default.
        dtype: of the weights.
        strip: also draw all frames of the first eight videos, a row for each, into this PNG file.
    """
    manifest = generate_videos(
        load(model, dtype, "prompt"), out, prompts=prompts, num_videos=num, seed=seed, batch_size=batch_size,
        num_inference_steps=steps, guidance_scale=guidance, height=height, width=width, num_frames=frames,
    )  # fmt: skip
    if strip is not None:
        save_strips(manifest.parent, strip)


def load(model: str, dtype: DType, takes: str) -> Any:
    """The pipeline, which must be one that takes what this command has for it."""
    pipeline = MHLAPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
    if takes not in inspect.signature(pipeline.__call__).parameters:
        other = "image" if takes == "prompt" else "video"
        raise ValueError(f"{model} holds a {type(pipeline).__name__}: use scripts/generate.py {other}")
    return pipeline


def main(arguments: Sequence[str], prog: str, kind: str) -> None:
    """Generate images, or videos."""
    kinds: dict[str, Callable[..., None]] = {"image": image, "video": video}
    parse_and_call(kinds[kind], arguments, prog)
