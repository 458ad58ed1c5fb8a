"""Write clips of a training source as MP4 files with captions.csv, to look at, train on or score against.

python scripts/export_videos.py --data.source moving_mnist --num 100 --out DIR
"""

from __future__ import annotations

import csv
import logging
import sys
from pathlib import Path

import torch
from jsonargparse import auto_cli
from tqdm import tqdm

from mhla_diffusion.files.videos import require_video_writer, write_video
from mhla_diffusion.files.writing import require_new_folder, write_folder
from mhla_diffusion.training.data import VideoDataConfig, VideoSamples, open_videos
from mhla_diffusion.training.data.stream import UnreadableSampleError


def main(data: VideoDataConfig, out: str, num: int | None = None, gray: bool = False) -> None:
    """Write clips of a training source as MP4 files with captions.csv.

    Args:
        data: where the clips come from; each begins at a random frame, the same in every call.
        out: a folder that does not exist yet.
        num: how many, from the first on; all by default.
        gray: without colours.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
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


if __name__ == "__main__":
    try:
        auto_cli(main, as_positional=False, allow_abbrev=False)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
