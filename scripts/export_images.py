"""Write the images of a training source as PNG files in class folders, to look at or to score against.

python scripts/export_images.py --data.source mnist --out DIR
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from jsonargparse import auto_cli
from tqdm import tqdm

from mhla_diffusion.files.writing import require_new_folder, write_folder
from mhla_diffusion.training.data import DataConfig, open_images


def main(data: DataConfig, out: str, num: int | None = None) -> None:
    """Write the images of a training source as PNG files in class folders.

    Args:
        data: where the images come from.
        out: a folder that does not exist yet.
        num: how many of the images, evenly spaced; all by default.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    target = require_new_folder(out)
    images = open_images(data)
    num = len(images) if num is None else num
    if not 1 <= num <= len(images):
        raise ValueError(f"num must be 1 to {len(images)}, the number of images, got {num}")

    def write(folder: Path) -> None:
        for name in images.class_names:
            (folder / name).mkdir(parents=True, exist_ok=True)
        for n in tqdm(range(num), desc="exporting", unit="image"):
            i = n * len(images) // num
            image, label = images.read(i)
            image.save(folder / images.class_names[label] / f"{i:06d}.png")

    write_folder(target, write)


if __name__ == "__main__":
    try:
        auto_cli(main, as_positional=False, allow_abbrev=False)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
