"""Many images or videos into a folder, with a manifest: in several processes, and resumable."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm.auto import tqdm

from mhla_diffusion.files.manifest import MANIFEST, read_manifest, write_manifest
from mhla_diffusion.files.videos import open_video, require_video_writer, write_video
from mhla_diffusion.files.writing import write_file

from .image import MHLADiTPipeline
from .video import MHLAWanPipeline

logger = logging.getLogger(__name__)


def generate_images(
    pipeline: MHLADiTPipeline,
    out: str | os.PathLike[str],
    *,
    num_images: int,
    class_labels: Sequence[int | str] | None = None,
    seed: int = 0,
    batch_size: int = 32,
    num_inference_steps: int = 50,
    guidance_scale: float = 4.0,
    height: int | None = None,
    width: int | None = None,
) -> Path:
    """Write ``num_images`` PNG files and manifest.json into a folder.

    Image i is of class ``class_labels[i % len(class_labels)]`` and has the seed ``seed + i``. Under
    ``accelerate launch`` the batches are shared out; what a batch holds does not depend on the number of
    processes, so that the files do not either. Other batch sizes give the same images within rounding.

    Calling again with the same settings goes on where an earlier call stopped.

    Args:
        pipeline: moved to the device of this process.
        out: a new or empty folder, or that of an unfinished run.
        num_images: how many.
        class_labels: ids or names to go through; all classes by default, which gives balanced classes.
        seed: of the first image.
        batch_size: images at a time, in one process.
        num_inference_steps, guidance_scale, height, width: see :meth:`MHLADiTPipeline.__call__`.

    Returns:
        The path of the manifest.

    Raises:
        ValueError: for settings that do not fit, or a folder that holds something else.
    """
    _check_counts("num_images", num_images, batch_size)
    if class_labels is not None and not class_labels:
        raise ValueError("class_labels is empty; leave it out for all classes")
    classes = pipeline.get_label_ids(
        list(range(pipeline.transformer.config.num_embeds_ada_norm))
        if class_labels is None
        else list(class_labels)
    )
    call = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    call |= {name: size for name, size in (("height", height), ("width", width)) if size is not None}
    names = {number: name for name, number in reversed(pipeline.labels.items())}
    rows = [
        {
            "file": f"{i:06d}.png",
            "class_id": classes[i % len(classes)],
            "class_name": names.get(classes[i % len(classes)]),
            "seed": seed + i,
        }
        for i in range(num_images)
    ]
    return _generate(pipeline, Path(out), "images", rows, batch_size=batch_size, call=call)


def generate_videos(
    pipeline: MHLAWanPipeline,
    out: str | os.PathLike[str],
    *,
    prompts: Sequence[str],
    num_videos: int | None = None,
    seed: int = 0,
    batch_size: int = 4,
    num_inference_steps: int = 50,
    guidance_scale: float = 5.0,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
) -> Path:
    """Write ``num_videos`` MP4 files and manifest.json into a folder; as :func:`generate_images`.

    Args:
        pipeline: moved to the device of this process.
        out: a new or empty folder, or that of an unfinished run.
        prompts: video i shows ``prompts[i % len(prompts)]``.
        num_videos: how many; one for each prompt by default.
        seed: of the first video; video i has ``seed + i``.
        batch_size: videos at a time, in one process.
        num_inference_steps, guidance_scale, height, width, num_frames: see :meth:`MHLAWanPipeline.__call__`.

    Returns:
        The path of the manifest.

    Raises:
        ValueError: for settings that do not fit, or a folder that holds something else.
        ImportError: when videos cannot be written.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a list of one text or more, got {prompts!r}")
    num_videos = len(prompts) if num_videos is None else num_videos
    _check_counts("num_videos", num_videos, batch_size)
    require_video_writer()
    rows = [
        {"file": f"{i:06d}.mp4", "prompt": prompts[i % len(prompts)], "seed": seed + i}
        for i in range(num_videos)
    ]
    call = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    sizes = (("height", height), ("width", width), ("num_frames", num_frames))
    call |= {name: size for name, size in sizes if size is not None}
    return _generate(pipeline, Path(out), "videos", rows, batch_size=batch_size, call=call)


def _check_counts(name: str, number: int, batch_size: int) -> None:
    if number < 1 or batch_size < 1:
        raise ValueError(f"{name} and batch_size must be at least 1, got {number} and {batch_size}")


def _generate(
    pipeline: Any,
    folder: Path,
    kind: str,
    rows: list[dict[str, Any]],
    *,
    batch_size: int,
    call: dict[str, Any],
) -> Path:
    """Make what the rows of a manifest say, each batch in one process; ``kind`` is the rows' name there."""
    state = PartialState()
    manifest = _describe(pipeline) | call | {"batch_size": batch_size, "complete": False, kind: rows}
    _check_folder(folder, manifest)
    state.wait_for_everyone()  # all have looked before one writes
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, manifest)
    state.wait_for_everyone()
    pipeline.to(state.device)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    _generate_batches(pipeline, folder, batches[state.process_index :: state.num_processes], call, kind)
    state.wait_for_everyone()
    if state.is_main_process:
        write_manifest(folder, manifest | {"complete": True})
        logger.info("%d %s in %s", len(rows), kind, folder)
    return folder / MANIFEST


def save_grid(folder: str | os.PathLike[str], path: str | os.PathLike[str], *, rows: int = 8) -> None:
    """One picture of a generated folder: a column for each class, in the order of the manifest.

    Args:
        folder: as :func:`generate_images` leaves it.
        path: of the picture, which is replaced if it is there.
        rows: images of each class, at most.
    """
    images = json.loads((Path(folder) / MANIFEST).read_text())["images"]
    by_class: dict[int, list[str]] = {}
    for row in images:
        by_class.setdefault(row["class_id"], []).append(row["file"])
    rows = min(rows, *(len(files) for files in by_class.values()))
    cells = [Image.open(Path(folder) / files[i]) for i in range(rows) for files in by_class.values()]
    _save_cells(cells, Path(path), rows=rows, columns=len(by_class))


def save_strips(folder: str | os.PathLike[str], path: str | os.PathLike[str], *, rows: int = 8) -> None:
    """One picture of generated videos: a row of all frames for each, in the order of the manifest.

    Args:
        folder: as :func:`generate_videos` leaves it.
        path: of the picture, which is replaced if it is there.
        rows: videos, at most.
    """
    videos = json.loads((Path(folder) / MANIFEST).read_text())["videos"][:rows]
    readers = [open_video(Path(folder) / row["file"]) for row in videos]
    columns = readers[0].num_frames
    cells = [Image.fromarray(frame) for reader in readers for frame in reader.read(range(columns))]
    _save_cells(cells, Path(path), rows=len(readers), columns=columns)


def _save_cells(cells: Sequence[Image.Image], path: Path, *, rows: int, columns: int) -> None:
    """A grid of images of one size; those smaller than 64 pixels are enlarged, each pixel to a square."""
    grid = make_image_grid(list(cells), rows=rows, cols=columns)
    factor = max(1, 64 // min(cells[0].size))
    size = (factor * grid.width, factor * grid.height)
    _save_image(grid.resize(size, Image.Resampling.NEAREST), path)


def _generate_batches(
    pipeline: Any, folder: Path, batches: list[list[dict[str, Any]]], call: dict[str, Any], kind: str
) -> None:
    pipeline.set_progress_bar_config(disable=True)
    asked, save = ("class_id", _save_image) if kind == "images" else ("prompt", _save_video(pipeline))
    total, main = sum(map(len, batches)), PartialState().is_main_process
    with tqdm(total=total, desc="generating", unit=kind.removesuffix("s"), disable=not main) as progress:
        for batch in batches:
            # A batch that was cut short is made again as a whole: a smaller one would differ by rounding.
            if not all((folder / row["file"]).exists() for row in batch):
                generators = [torch.Generator().manual_seed(row["seed"]) for row in batch]
                made = pipeline(
                    [row[asked] for row in batch], generator=generators, return_dict=False, **call
                )[0]
                for row, item in zip(batch, made, strict=True):
                    save(item, folder / row["file"])
            progress.update(len(batch))


def _describe(pipeline: MHLADiTPipeline) -> dict[str, Any]:
    """What the images depend on besides the settings of the call."""
    config = {key: value for key, value in pipeline.transformer.config.items() if not key.startswith("_")}
    digest = hashlib.sha256()
    for name, tensor in sorted(pipeline.transformer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "model": str(pipeline.config.get("_name_or_path") or ""),
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "weights_sha256": digest.hexdigest(),
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
        "scheduler": {"class": type(pipeline.scheduler).__name__, **pipeline.scheduler.config},
        "training": pipeline.config.training,
        "versions": {name: version(name) for name in ("mhla-diffusion", "torch", "diffusers", "accelerate")},
    }


def _check_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """Go on with a folder only when it holds the beginning of the same run.

    Raises:
        ValueError: otherwise, naming what differs.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return
    stored = read_manifest(folder)
    if stored is None:
        raise ValueError(f"{folder} holds files but no {MANIFEST}: choose a new or an empty folder")
    expected = json.loads(json.dumps(manifest, default=str))
    # The folder of the model and the versions are for the reader: the hashes say which model it is.
    compared = expected.keys() - {"complete", "versions", "model", "training"}
    if different := sorted(key for key in compared if stored.get(key) != expected[key]):
        changes = "; ".join(
            f"{key}: {_shorten(stored.get(key))} -> {_shorten(expected[key])}" for key in different
        )
        raise ValueError(
            f"{folder} holds another run ({changes}); choose another folder, or the same settings"
        )


def _shorten(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} rows"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _save_image(image: Image.Image, path: Path) -> None:
    write_file(path, partial(image.save, format="PNG"))


def _save_video(pipeline: MHLAWanPipeline) -> Callable[[Any, Path], None]:
    def save(frames: Any, path: Path) -> None:
        # [F, H, W, C] in 0 to 1
        pixels = (frames * 255).round().astype("uint8")
        write_video(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, path, fps=pipeline.config.fps)

    return save
