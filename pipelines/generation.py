"""Many images or videos into a folder, with a manifest: in several processes, and resumable."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from mhla_diffusion.arguments import MAX_SEED, require_positive, require_seed
from mhla_diffusion.files.locking import only_writer
from mhla_diffusion.files.manifest import MANIFEST, read_manifest, write_manifest
from mhla_diffusion.files.pictures import DECODING_ERRORS, read_picture
from mhla_diffusion.files.sums import matches, read_sums, record_sums
from mhla_diffusion.files.text import changes, flat_dict, shortened
from mhla_diffusion.files.videos import open_video, require_video_writer, write_video
from mhla_diffusion.files.writing import remove_partial
from mhla_diffusion.processes import in_first_process, one_fate, process_state, wait_for_all

from .identity import describe, training_of
from .prompts import Prompt
from .rows import class_rows, prompt_rows
from .sampling import (
    Kind,
    batches,
    call_arguments,
    call_parameters,
    frames_per_second,
    output_kind,
    sample,
    takes_one_text,
)
from .sheets import save_grid, save_image, save_strips

__all__ = ["generate_images", "generate_videos", "save_grid", "save_strips"]

logger = logging.getLogger(__name__)

_SCRIPTS: dict[Kind, str] = {"images": "image", "videos": "video"}
# The folder of the model and the versions are for the reader: the hashes say which model it is.
_NOT_COMPARED = {"complete", "versions", "model", "training"}
# Folders that were begun before these were written are gone on with.
_LATER = {"components", "pipeline", "fps", "pipeline.prediction_type", "pipeline.sample_size"}


def generate_images(
    pipeline: Any,
    out: str | os.PathLike[str],
    *,
    num_images: int | None = None,
    class_labels: Sequence[int | str] | None = None,
    prompts: Sequence[str | Prompt] | None = None,
    per_prompt: int | None = None,
    negative_prompt: str | None = None,
    seed: int = 0,
    batch_size: int = 32,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Write PNG files and manifest.json into a folder.

    Image i is of class ``class_labels[i % len(class_labels)]``, or of a prompt as :func:`generate_videos` has
    it, and has the seed ``seed + i``. Processes share out the batches; what a batch
    holds does not depend on the number of processes, so that the files do not either. Other batch sizes give
    the same images within rounding.

    Calling again with the same settings goes on where an earlier call stopped, and with more images adds
    these. SHA256SUMS has the hash of
    each file that is done; one that is missing or another is made again.

    Args:
        pipeline: makes images of classes or of texts; moved to the device of this process.
        out: a new or empty folder, or that of an unfinished run.
        num_images: how many; by default one for each prompt.
        class_labels: ids or names to go through; all classes by default, which gives balanced classes.
        prompts, per_prompt, negative_prompt: see :func:`generate_videos`.
        seed: of the first image.
        batch_size: images at a time, in one process; of Kandinsky 5, where a text would change those beside
            it, 1.
        num_inference_steps, guidance_scale, height, width: as for the pipeline. When None the size is that of
            the training, as far as that is known, and the others are the pipeline's own defaults.
        options: more arguments of the pipeline's call, as JSON values.

    Returns:
        The path of the manifest.

    Raises:
        ValueError: for settings that do not fit, a folder that holds something else or that another process
            is writing to, or images that hold NaN, of which none is written.
        ConnectionError: when another process of this run has ended.
    """
    settings = {
        "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "height": height,
        "width": width,
    }  # fmt: skip
    _check_numbers({"num_images": num_images, "per_prompt": per_prompt, "batch_size": batch_size, **settings})
    require_seed(seed)
    _require_output(pipeline, "images")
    pictures: list[Path | None]
    if "class_labels" in call_parameters(pipeline):
        given = {"prompts": prompts, "per_prompt": per_prompt, "negative_prompt": negative_prompt}
        if names := [name for name, value in given.items() if value is not None]:
            name = type(pipeline).__name__
            raise ValueError(f"{name} makes images of classes: leave out {', '.join(names)}")
        rows = class_rows(pipeline, num_images, class_labels, seed)
        pictures = [None] * len(rows)
    elif class_labels is not None:
        raise ValueError(f"{type(pipeline).__name__} makes images of texts: give prompts, not class_labels")
    else:
        rows, pictures = prompt_rows(
            prompts, num_images, per_prompt, seed=seed, negative_prompt=negative_prompt, kind="images"
        )
    return _generate(
        pipeline, Path(out), "images", rows, pictures, call=call_arguments(pipeline, rows, settings, options),
        batch_size=1 if takes_one_text(pipeline) else batch_size,
    )  # fmt: skip


def generate_videos(
    pipeline: Any,
    out: str | os.PathLike[str],
    *,
    prompts: Sequence[str | Prompt],
    images: str | os.PathLike[str] | None = None,
    num_videos: int | None = None,
    per_prompt: int | None = None,
    negative_prompt: str | None = None,
    seed: int = 0,
    batch_size: int = 4,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Write MP4 files and manifest.json into a folder; as :func:`generate_images`.

    Args:
        pipeline: makes videos of texts, or of texts and pictures; moved to the device of this process.
        out: a new or empty folder, or that of an unfinished run.
        prompts: video i shows ``prompts[i % len(prompts)]``. A :class:`.Prompt` may have a seed, a negative
            prompt, a name for its file, a size and a picture of its own; see :func:`.read_prompts` for files
            of them.
        images: for image-to-video and Wan VACE, a folder with a first frame for each prompt, in the order of
            their names.
        num_videos: how many; one for each prompt by default.
        per_prompt: videos of each prompt, one after the other, instead of ``num_videos``.
        negative_prompt: of the prompts that have none of their own.
        seed: of the first video; video i has ``seed + i``, unless its prompt has a seed.
        batch_size: videos at a time, in one process. With pictures, and of Wan VACE, 1: diffusers' pipelines
            take one a call; of Kandinsky 5 and Latte too, where a text would change those beside it.
        num_inference_steps, guidance_scale, height, width, num_frames: see :func:`generate_images`.
        fps: frames per second of the files; as the pipeline or its training states by default, else 16.
            Models that are told a ``frame_rate`` are told this, but where that of their training is known.
        options: more arguments of the pipeline's call, as JSON values.

    Returns:
        The path of the manifest.

    Raises:
        ValueError: for settings that do not fit, a folder that holds something else, or videos that hold
            NaN, of which none is written.
        ImportError: when videos cannot be written.
    """
    settings = {
        "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "height": height,
        "width": width, "num_frames": num_frames,
    }  # fmt: skip
    _check_numbers({"num_videos": num_videos, "per_prompt": per_prompt, "batch_size": batch_size, **settings})
    require_seed(seed)
    _require_output(pipeline, "videos")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps must be a number above 0, got {fps}")
    rows, pictures = prompt_rows(
        prompts, num_videos, per_prompt, seed=seed, negative_prompt=negative_prompt, kind="videos",
        folder=images,
    )  # fmt: skip
    require_video_writer()
    # What was trained has the rate of its training, whatever that of the files.
    if "frame_rate" in call_parameters(pipeline) and not training_of(pipeline):
        settings["frame_rate"] = fps
    call = call_arguments(pipeline, rows, settings, options)
    return _generate(
        pipeline, Path(out), "videos", rows, pictures, call=call,
        fps=frames_per_second(pipeline, call, fps or (options or {}).get("frame_rate")),
        batch_size=1 if takes_one_text(pipeline) or pictures[0] is not None else batch_size,
    )  # fmt: skip


def _check_numbers(settings: Mapping[str, float | None]) -> None:
    """Refuse what would fail, or give nothing, only after the model has been moved to its device."""
    require_positive(**{name: value for name, value in settings.items() if name != "guidance_scale"})


def _require_output(pipeline: Any, kind: Kind) -> None:
    made = output_kind(pipeline)
    if made != kind:
        other = f"generate_{made} (mhla generate {_SCRIPTS[made]})"
        raise ValueError(f"{type(pipeline).__name__} makes {made}: use {other}")


def _generate(
    pipeline: Any,
    folder: Path,
    kind: Kind,
    rows: list[dict[str, Any]],
    pictures: list[Path | None],
    *,
    batch_size: int,
    call: dict[str, Any],
    fps: float | None = None,
) -> Path:
    """Make what the rows of a manifest say, each batch in one process; ``kind`` is the rows' name there."""
    if wrong := [row["seed"] for row in rows if not 0 <= row["seed"] <= MAX_SEED]:
        raise ValueError(
            f"seed must lie between 0 and {MAX_SEED}, with one more for each sample, got {wrong[0]}"
        )
    state = process_state()
    settings = describe(pipeline) | call | ({} if fps is None else {"fps": fps})
    manifest = settings | {"batch_size": batch_size, "complete": False, kind: rows}
    with one_fate(), ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(only_writer(folder))
            for place in {(folder / row["file"]).parent for row in rows}:
                remove_partial(place)
            _check_folder(folder, manifest, kind)
            write_manifest(folder, manifest)
            made = [row["file"] for row in rows if (folder / row["file"]).is_file()]
            if made and read_sums(folder) is None:
                record_sums(folder, [name for name in made if _opens(folder / name, kind)])

        in_first_process(enter)
        pipeline.to(state.device)
        pipeline.set_progress_bar_config(disable=True)
        mine = batches(rows, batch_size)[state.process_index :: state.num_processes]
        total = sum(len(rows[batch]) for batch in mine)
        hidden, sums = not state.is_main_process, read_sums(folder) or {}
        with tqdm(total=total, desc="generating", unit=_SCRIPTS[kind], disable=hidden) as progress:
            for batch in mine:
                if not _is_made(folder, rows[batch], sums):
                    _make_batch(pipeline, folder, rows[batch], pictures[batch], call, fps)
                progress.update(len(rows[batch]))
        wait_for_all()
        if state.is_main_process:
            write_manifest(folder, manifest | {"complete": True})
            logger.info("%d %s in %s", len(rows), kind, folder)
    return folder / MANIFEST


def _is_made(folder: Path, rows: list[dict[str, Any]], sums: Mapping[str, str]) -> bool:
    """Return True when all files of a batch are what was written.

    A batch that was cut short is made again as a whole: a smaller one would differ by rounding.
    """
    wrong = [row["file"] for row in rows if not matches(folder / row["file"], sums.get(row["file"]))]
    if damaged := [name for name in wrong if (folder / name).exists()]:
        logger.warning("%s: not what this run wrote, and made again", ", ".join(damaged))
    return not wrong


def _opens(path: Path, kind: Kind) -> bool:
    """Return True when a file that an earlier version left without its hash can be decoded."""
    try:
        if kind == "images":
            read_picture(path)
        else:
            reader = open_video(path)
            reader.read([0, reader.num_frames - 1])
    except DECODING_ERRORS:
        return False
    return True


def _make_batch(
    pipeline: Any,
    folder: Path,
    rows: list[dict[str, Any]],
    pictures: list[Path | None],
    call: dict[str, Any],
    fps: float | None,
) -> None:
    for row, pixels in zip(rows, sample(pipeline, rows, call, pictures), strict=True):
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        if fps is None:
            save_image(Image.fromarray(pixels), folder / row["file"])
        else:
            write_video(pixels, folder / row["file"], fps=fps)
    record_sums(folder, [row["file"] for row in rows])


def _check_folder(folder: Path, manifest: dict[str, Any], kind: Kind) -> None:
    """Go on with a folder only when it holds the beginning of the same run, or of one with fewer samples.

    Raises:
        ValueError: otherwise, naming what differs.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return
    stored = read_manifest(folder)
    if stored is None:
        raise ValueError(f"{folder} holds files but no {MANIFEST}: choose a new or an empty folder")
    if {path.name for path in folder.iterdir()} == {MANIFEST}:  # nothing is made yet: settings may change
        return
    expected = json.loads(json.dumps(manifest, default=str))
    rows = stored.get(kind)
    if isinstance(rows, list) and expected[kind][: len(rows)] == rows:  # or more of it
        stored[kind] = expected[kind]
    compared = expected.keys() | stored.keys()
    compared -= _NOT_COMPARED | (_LATER - stored.keys())
    old, new = ({key: values.get(key) for key in sorted(compared)} for values in (stored, expected))
    # What diffusers notes of itself in a config.
    noted = {key for key in flat_dict(old) | flat_dict(new) if re.search(r"(^|\.)_", key)}
    if others := changes(old, new, free=noted | (_LATER - flat_dict(old).keys()), show=_shorten):
        raise ValueError(
            f"{folder} holds another run ({'; '.join(others)}); choose another folder, or the same settings"
        )


def _shorten(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} rows"
    text = shortened(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
