"""Pictures that show many generated samples at once."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from diffusers.utils import make_image_grid
from PIL import Image

from mhla_diffusion.files.manifest import MANIFEST
from mhla_diffusion.files.videos import open_video
from mhla_diffusion.files.writing import write_file


def save_grid(folder: str | os.PathLike[str], path: str | os.PathLike[str], *, rows: int = 8) -> None:
    """Draw one picture of a generated folder: a column for each class or prompt, in the manifest's order.

    Args:
        folder: as :func:`.generate_images` leaves it.
        path: of the picture, which is replaced if it is there.
        rows: images of each class or prompt, at most.
    """
    images = json.loads((Path(folder) / MANIFEST).read_text())["images"]
    by_class: dict[int | str, list[str]] = {}
    for row in images:
        by_class.setdefault(row.get("class_id", row.get("prompt")), []).append(row["file"])
    rows = min(rows, *(len(files) for files in by_class.values()))
    cells = [Image.open(Path(folder) / files[i]) for i in range(rows) for files in by_class.values()]
    _save_cells(cells, Path(path), rows=rows, columns=len(by_class))


def save_strips(folder: str | os.PathLike[str], path: str | os.PathLike[str], *, rows: int = 8) -> None:
    """Draw one picture of generated videos: a row of all frames for each, in the order of the manifest.

    Args:
        folder: as :func:`.generate_videos` leaves it.
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
    save_image(grid.resize(size, Image.Resampling.NEAREST), path)


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG file, whole or not at all."""
    write_file(path, partial(image.save, format="PNG"))
