"""``mhla export``: a training source as files, to look at, train on or score against.

mhla export images --data.source mnist --out DIR
mhla export videos --data.source moving_mnist --num 100 --out DIR
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ..files.videos import require_video_writer, write_video
from ..files.writing import require_new_folder, write_folder
from ..training.data import DataConfig, VideoDataConfig, VideoSamples, open_images, open_videos
from ..training.data.stream import UnreadableSampleError
from .parsing import parse_and_call


def main(arguments: Sequence[str], prog: str, kind: str) -> None:
    """Export images, or videos."""
    kinds: dict[str, Callable[..., None]] = {"images": images, "videos": videos}
    parse_and_call(kinds[kind], arguments, prog)


def images(data: DataConfig, out: str, num: int | None = None) -> None:
    """Write the images of a training source as PNG files in class folders.

    Args:
        data: where the images come from.
        out: a folder that does not exist yet.
        num: how many of the images, evenly spaced; all by default.
    """
    target = require_new_folder(out)
    source = open_images(data)
    num = len(source) if num is None else num
    if not 1 <= num <= len(source):
        raise ValueError(f"num must be 1 to {len(source)}, the number of images, got {num}")

    def write(folder: Path) -> None:
        for name in source.class_names:
            (folder / name).mkdir(parents=True, exist_ok=True)
        for n in tqdm(range(num), desc="exporting", unit="image"):
            i = n * len(source) // num
            image, label = source.read(i)
            image.save(folder / source.class_names[label] / f"{i:06d}.png")

    write_folder(target, write)


def videos(data: VideoDataConfig, out: str, num: int | None = None, gray: bool = False) -> None:
    """Write clips of a training source as MP4 files with captions.csv.

    Args:
        data: where the clips come from; each begins at a random frame, the same in every call.
        out: a folder that does not exist yet.
        num: how many, from the first on; all by default.
        gray: without colours.
    """
    target = require_new_folder(out)
    require_video_writer()
    source = VideoSamples(open_videos(data), data, channels=1 if gray else 3)
    num = len(source) if num is None else num
    if not 1 <= num <= len(source):
        raise ValueError(f"num must be 1 to {len(source)}, the number of videos, got {num}")

    def write(folder: Path) -> None:
        with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
            captions = csv.writer(file)
            captions.writerow(["path", "caption"])
            for i in tqdm(range(num), desc="exporting", unit="video"):
                try:
                    sample = source.load(i, torch.Generator().manual_seed(i))
                except UnreadableSampleError as error:
                    logging.warning("skipped: %s", error)
                    continue
                # [C, F, H, W] in [-1, 1] to [F, H, W, 3]
                pixels = ((sample["samples"] + 1) * 127.5).round().clamp(0, 255).byte()
                frames = pixels.permute(1, 2, 3, 0).expand(-1, -1, -1, 3).numpy()
                write_video(frames, folder / f"{i:06d}.mp4", fps=data.fps or 16)
                captions.writerow([f"{i:06d}.mp4", sample["caption"]])

    write_folder(target, write)
