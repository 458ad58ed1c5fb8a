"""``mhla generate``: images or videos into a folder, files and manifest.json.

    accelerate launch -m mhla_diffusion generate image --model DIR --num 1000 --out DIR
    accelerate launch -m mhla_diffusion generate video --model DIR --prompts "a red car, at night" --out DIR

Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from mhla_diffusion.pipelines.generation import generate_images, generate_videos, save_grid, save_strips
from mhla_diffusion.pipelines.prompts import read_prompts
from mhla_diffusion.pipelines.sampling import output_kind

from .. import MHLAPipeline
from ..files.writing import require_writable
from ..processes import in_first_process
from ..training.checkpoints import is_checkpoint
from ..training.export import is_run, newest_model, open_checkpoint
from .parsing import join_prompts, parse_and_call

DType = Literal["float32", "bfloat16", "float16"]


def image(
    model: str,
    out: str,
    num: int | None = None,
    classes: list[int | str] | None = None,
    prompts: list[str] | None = None,
    per_prompt: int | None = None,
    negative_prompt: str | None = None,
    batch_size: int = 32,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    options: dict[str, Any] | None = None,
    dtype: DType = "float32",
    grid: str | None = None,
) -> None:
    """Generate images of classes or texts: PNG files and manifest.json.

    Args:
        model: folder or hub id of a pipeline; or the folder of a training, for the newest of it, or of a
            checkpoint there.
        out: a new folder, or that of an unfinished run.
        num: number of images; of texts one for each prompt by default.
        classes: class ids or names to go through; all by default.
        prompts: texts or files of them, as for videos.
        per_prompt: images of each prompt, each with its own seed, instead of num.
        negative_prompt: what the images should not show, where a file of prompts does not say it.
        batch_size: images at a time in one process.
        steps: denoising steps; the pipeline's default if not given (50 for classes).
        guidance: scale of classifier-free guidance; 1 for none; the pipeline's default if not given (4 for
            classes).
        seed: of the first image; image i has seed + i.
        height: in pixels; the training size by default.
        width: in pixels; the training size by default.
        options: more arguments of the pipeline's call, such as '{"max_sequence_length": 128}'.
        dtype: of the weights.
        grid: also draw the first images, a column for each class or prompt, into this PNG file.
    """
    _require_picture("grid", grid, out)
    texts = None if prompts is None else read_prompts(prompts)
    manifest = generate_images(
        load(model, dtype, "images"), out, num_images=num, class_labels=classes, prompts=texts,
        per_prompt=per_prompt, negative_prompt=negative_prompt, seed=seed, batch_size=batch_size,
        num_inference_steps=steps, guidance_scale=guidance, height=height, width=width, options=options,
    )  # fmt: skip
    if grid is not None:
        in_first_process(lambda: save_grid(manifest.parent, grid))


def video(
    model: str,
    out: str,
    prompts: list[str],
    images: str | None = None,
    num: int | None = None,
    per_prompt: int | None = None,
    negative_prompt: str | None = None,
    batch_size: int = 4,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    options: dict[str, Any] | None = None,
    dtype: DType = "float32",
    strip: str | None = None,
) -> None:
    """Generate videos of texts, or of texts and images: MP4 files and manifest.json.

    Args:
        model: folder or hub id of a pipeline; or the folder of a training, for the newest of it, or of a
            checkpoint there.
        out: a new folder, or that of an unfinished run.
        prompts: a text, commas included; a list in brackets, each text in quotes; or a file: .txt with one
            text a line, .csv or .jsonl with the columns prompt, seed, negative_prompt, file (name of the
            video), height, width and image (path inside images, or the folder of the file). May be repeated.
        images: for image-to-video and Wan VACE, a folder of first frames: one for each prompt in the order of
            their names, or those that the column image names.
        num: number of videos; one for each prompt by default.
        per_prompt: videos of each prompt, each with its own seed, instead of num; VBench asks for 5.
        negative_prompt: what the videos should not show, where a file of prompts does not say it.
        batch_size: videos at a time in one process; with images, and of Wan VACE, 1.
        steps: denoising steps; the pipeline's default if not given (50).
        guidance: scale of classifier-free guidance; 1 for none; the pipeline's default if not given (Wan 5,
            SanaVideo 6).
        seed: of the first video; video i has seed + i.
        height: in pixels; the training size by default.
        width: in pixels; the training size by default.
        frames: number of frames; that of the training by default.
        fps: frames a second of the files; those that the pipeline or its training states, else 16.
        options: more arguments of the pipeline's call, such as '{"use_resolution_binning": false}'.
        dtype: of the weights.
        strip: also draw all frames of the first eight videos, a row for each, into this PNG file.
    """
    _require_picture("strip", strip, out)
    texts = read_prompts(prompts, images=images)
    manifest = generate_videos(
        load(model, dtype, "videos"), out, prompts=texts, num_videos=num, per_prompt=per_prompt,
        negative_prompt=negative_prompt, seed=seed, batch_size=batch_size, num_inference_steps=steps,
        guidance_scale=guidance, height=height, width=width, num_frames=frames, fps=fps, options=options,
    )  # fmt: skip
    if strip is not None:
        in_first_process(lambda: save_strips(manifest.parent, strip))


def _require_picture(option: str, path: str | None, out: str) -> None:
    """Check, before anything is made, that a picture can be written there."""
    if path is None:
        return
    if Path(path).is_dir() or Path(path).resolve() == Path(out).resolve():
        raise ValueError(f"{path} is a folder: give the name of a PNG file, such as {path}/samples.png")
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{option} is a PNG file: its name must end in .png, got {path}")
    require_writable(Path(path).parent)


def load(model: str, dtype: DType, kind: str) -> Any:
    """Load the pipeline, which must be one that makes what this command writes."""
    pipeline = _open(model, getattr(torch, dtype))
    if output_kind(pipeline) != kind:
        other = output_kind(pipeline).removesuffix("s")
        raise ValueError(f"{model} holds a {type(pipeline).__name__}: use mhla generate {other}")
    return pipeline


def _open(model: str, dtype: torch.dtype) -> Any:
    run = Path(model)
    if is_checkpoint(run):
        return open_checkpoint(run, dtype=dtype)
    if is_run(run):
        newest = in_first_process(lambda: newest_model(run))  # a training may go on there
        logging.info("%s: taking %s", run, newest)
        if newest.parent != run:
            return open_checkpoint(newest, dtype=dtype)
        model = str(newest)
    return MHLAPipeline.from_pretrained(model, dtype=dtype)


def main(arguments: Sequence[str], prog: str, kind: str) -> None:
    """Generate images, or videos."""
    kinds: dict[str, Callable[..., None]] = {"image": image, "video": video}
    parse_and_call(kinds[kind], join_prompts(arguments), prog)
