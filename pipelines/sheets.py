"""Pictures that show many generated samples at once."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont

from mhla_diffusion.files.manifest import MANIFEST
from mhla_diffusion.files.pictures import read_picture
from mhla_diffusion.files.videos import open_video
from mhla_diffusion.files.writing import write_file

MOST = 64


def save_grid(folder: str | os.PathLike[str], path: str | os.PathLike[str], *, rows: int = 8) -> None:
    """Draw one picture of a generated folder: a column for each class or prompt, in the manifest's order.

    With one image for each prompt the first :data:`MOST` are laid out in a square, their prompts below them.

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
    if rows == 1 and "prompt" in images[0]:
        shown = list(by_class.items())[:MOST]
        cells = [_with_text(read_picture(Path(folder) / files[0]), str(text)) for text, files in shown]
        columns = math.isqrt(len(cells) - 1) + 1
        rows = -(-len(cells) // columns)
        cells += [Image.new("RGB", cells[0].size, "white")] * (rows * columns - len(cells))
        save_image(make_image_grid(cells, rows=rows, cols=columns), Path(path))
        return
    cells = [read_picture(Path(folder) / files[i]) for i in range(rows) for files in by_class.values()]
    _save_cells(cells, Path(path), rows=rows, columns=len(by_class))


def _with_text(image: Image.Image, text: str) -> Image.Image:
    """A picture, enlarged to 128 pixels if it is smaller, and two lines of text below it."""
    factor = max(1, 128 // min(image.size))
    image = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    size = max(10, image.width // 16)
    cell = Image.new("RGB", (image.width + 8, image.height + 3 * size + 8), "white")
    cell.paste(image, (4, 4))
    font, lines = (
        ImageFont.load_default(size=size),
        textwrap.wrap(text, width=round(1.9 * image.width / size)),
    )
    ImageDraw.Draw(cell).multiline_text((4, image.height + 6), "\n".join(lines[:2]), fill="black", font=font)
    return cell


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
