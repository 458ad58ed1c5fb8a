"""``mhla export``: a training source as files, to look at, train on or score against.

mhla export images --data.source mnist --out DIR
mhla export videos --data.source moving_mnist --num 100 --out DIR
"""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from mhla_diffusion.pipelines.sampling import DEFAULT_FPS

from ..files.locking import new_folder
from ..files.pictures import DECODING_ERRORS
from ..files.videos import require_video_writer, write_video
from ..files.writing import write_folder
from ..training.data import DataConfig, VideoDataConfig, VideoSamples, open_images, open_videos
from ..training.data.buckets import nearest_size
from ..training.data.encoding import readable
from ..training.data.image_sources import sizes_of
from ..training.data.images import Images, cover
from ..training.data.stream import is_of_disk, to_pixels
from ..training.data.videos import VideoFiles
from .parsing import parse_and_call


def main(arguments: Sequence[str], prog: str, kind: str) -> None:
    """Export images, or videos."""
    kinds: dict[str, Callable[..., None]] = {"images": images, "videos": videos}
    parse_and_call(kinds[kind], arguments, prog)


def images(data: DataConfig, out: str, num: int | None = None, captions: bool = False) -> None:
    """Write the images of a training source as PNG files, in class folders or with captions.csv.

    Args:
        data: where the images come from. With sizes or aspect_ratios they are resized and cropped as training
            has them, else as they are; none is mirrored.
        out: a folder that does not exist yet.
        num: how many of the images, evenly spaced; all by default.
        captions: with captions in place of classes, as models of texts are trained on them.
    """
    with new_folder(out) as target:
        source = open_images(data, captioned=captions)
        folders = _class_folders(source.class_names)
        num = _require_num(num, len(source), "images")

        def write(folder: Path) -> None:
            for name in folders:
                (folder / name).mkdir()
            listed: list[tuple[str, str, float]] = []
            skipped = 0
            for n in tqdm(range(num), desc="exporting", unit="image"):
                i = n * len(source) // num
                try:
                    picture = _read(source, i, data)
                except DECODING_ERRORS as error:
                    if is_of_disk(error):
                        raise
                    logging.warning("skipped: %s: %s", source.name(i), error)
                    skipped += 1
                    continue
                place = "" if source.labels is None else folders[source.labels[i]]
                picture.save(folder / place / f"{i:06d}.png")
                caption = None if source.captions is None else source.captions[i]
                texts = {caption: 1.0} if isinstance(caption, str) else caption or {}
                listed += [(f"{i:06d}.png", text, weight) for text, weight in texts.items()]
            _tell_skipped(skipped, num, "images")
            if captions:
                _write_captions(folder, [("path", "caption", "weight"), *listed])

        write_folder(target, write)


def videos(data: VideoDataConfig, out: str, num: int | None = None, gray: bool = False) -> None:
    """Write clips of a training source as MP4 files with captions.csv.

    Args:
        data: where the clips come from; each begins at a random frame, the same in every call. Without fps
            they have the rate of their file, and clips that are drawn 16 frames a second.
        out: a folder that does not exist yet.
        num: how many, from the first on; all by default.
        gray: without colours.
    """
    with new_folder(out) as target:
        require_video_writer()
        source = VideoSamples(open_videos(data), data, channels=1 if gray else 3)
        num = _require_num(num, len(source), "videos")
        write_folder(target, partial(_write_videos, source, num))


def _read(source: Images, index: int, data: DataConfig) -> Image.Image:
    """A picture, at the size that its config brings it to, if any."""
    picture = source.read(index)
    if not (sizes := sizes_of(data)):
        return picture
    size = sizes[nearest_size((picture.height, picture.width), sizes)]
    return cover(picture, size, enlarge=data.enlarge)


def _require_num(num: int | None, there: int, kind: str) -> int:
    num = there if num is None else num
    if not 1 <= num <= there:
        raise ValueError(f"num must be 1 to {there}, the number of {kind}, got {num}")
    return num


def _tell_skipped(skipped: int, num: int, kind: str) -> None:
    """Say how many could not be read.

    Raises:
        ValueError: when none could.
    """
    if skipped == num:
        raise ValueError(f"not one of {num} {kind} could be read (above: why), so that nothing is written")
    if skipped:
        logging.warning("%d of %d %s were skipped, %d written", skipped, num, kind, num - skipped)


def _class_folders(class_names: Sequence[str]) -> list[str]:
    """Return a folder's name for each class: what a data set calls a class may lead to another place."""
    folders = list[str]()
    for number, name in enumerate(class_names):
        folder = re.sub(r"[/\\\0]|^\.+", "_", name).strip() or "_"
        folder = os.fsdecode(os.fsencode(folder)[:200])
        folders.append(f"{folder}-{number}" if folder in folders else folder)
    return folders


def _write_videos(source: VideoSamples, num: int, folder: Path) -> None:
    listed, videos = [], source.videos
    for i, sample, _ in readable(source, tqdm(range(num), desc="exporting", unit="video")):
        # [C, F, H, W] in [-1, 1] to [F, H, W, 3]
        pixels = to_pixels(sample["samples"])
        frames = pixels.permute(1, 2, 3, 0).expand(-1, -1, -1, 3).numpy()
        rate = videos.rate(i) if isinstance(videos, VideoFiles) else DEFAULT_FPS
        write_video(frames, folder / f"{i:06d}.mp4", fps=source.config.fps or rate)
        listed.append((f"{i:06d}.mp4", sample["caption"]))
    _tell_skipped(num - len(listed), num, "videos")
    _write_captions(folder, [("path", "caption"), *listed])


def _write_captions(folder: Path, rows: Sequence[Sequence[Any]]) -> None:
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
