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
from ..training.data.captions import texts_of
from ..training.data.stream import UnreadableSampleError
from .parsing import parse_and_call


def main(arguments: Sequence[str], prog: str, kind: str) -> None:
    """Export images, or videos."""
    kinds: dict[str, Callable[..., None]] = {"images": images, "videos": videos}
    parse_and_call(kinds[kind], arguments, prog)


def images(data: DataConfig, out: str, num: int | None = None, captions: bool = False) -> None:
    """Write the images of a training source as PNG files, in class folders or with captions.csv.

    Args:
        data: where the images come from.
        out: a folder that does not exist yet.
        num: how many of the images, evenly spaced; all by default.
        captions: with captions in place of classes, as models of texts are trained on them.
    """
    target = require_new_folder(out)
    source = open_images(data, captioned=captions)
    num = len(source) if num is None else num
    if not 1 <= num <= len(source):
        raise ValueError(f"num must be 1 to {len(source)}, the number of images, got {num}")

    def write(folder: Path) -> None:
        for name in source.class_names:
            (folder / name).mkdir(parents=True, exist_ok=True)
        listed = []
        for n in tqdm(range(num), desc="exporting", unit="image"):
            i = n * len(source) // num
            place = "" if source.labels is None else source.class_names[source.labels[i]]
            source.read(i).save(folder / place / f"{i:06d}.png")
            if source.captions is not None:
                listed += [(f"{i:06d}.png", text) for text in texts_of([source.captions[i]])]
        if captions:
            _write_captions(folder, listed)

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
        listed = []
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
            listed.append((f"{i:06d}.mp4", sample["caption"]))
        _write_captions(folder, listed)

    write_folder(target, write)


def _write_captions(folder: Path, listed: Sequence[tuple[str, str]]) -> None:
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "caption"), *listed])
