"""Generate images into a folder: PNG files and manifest.json.

    accelerate launch scripts/generate.py --model DIR --num 1000 --out DIR

Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import logging
import sys

import torch
from jsonargparse import auto_cli

from mhla_diffusion import MHLAPipeline
from mhla_diffusion.pipelines.generation import generate_images, save_grid


def main(
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
    dtype: str = "float32",
    grid: str | None = None,
) -> None:
    """Generate images into a folder: PNG files and manifest.json.

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
        dtype: float32, bfloat16 or float16.
        grid: also draw the first images, a column for each class, into this PNG file.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    pipeline = MHLAPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
    manifest = generate_images(
        pipeline, out, num_images=num, class_labels=classes, seed=seed, batch_size=batch_size,
        num_inference_steps=steps, guidance_scale=guidance, height=height, width=width,
    )  # fmt: skip
    if grid is not None:
        save_grid(manifest.parent, grid)


if __name__ == "__main__":
    try:
        auto_cli(main, as_positional=False, allow_abbrev=False)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
