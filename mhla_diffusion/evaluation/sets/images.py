"""Sets of images in folders, npz files and datasets: which there are, in which order, read how."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from ...files.arrays import describe_kind, file_kind, npz_headers, read_npy_header
from ...files.pictures import (
    EXTENSIONS,
    PICTURE_CONVERSION,
    WHITE,
    background_color,
    flat_picture,
    open_picture,
)
from .archives import open_archives
from .datasets import open_dataset
from .samples import Folder, Pixels, SampleKind, SampleSet, one_if_large


@dataclass
class NpzImages(SampleSet):
    """Images in the npz layout of ADM: ``arr_0`` uint8 ``[N, H, W, C]`` or ``[N, H, W]``.

    ``labels`` or ``arr_1`` ``[N]`` are the class ids, when there. Images are streamed out of the archive, so
    that its size does not matter.

    Raises:
        ValueError: when the file cannot be read, is damaged or has another layout.
    """

    path: Path

    def __post_init__(self) -> None:
        headers = npz_headers(self.path)
        if "arr_0" not in headers:
            raise ValueError(f"{self.path} has no arr_0 (uint8 images), only {', '.join(headers)}")
        shape, dtype = headers["arr_0"]
        gray, colour = len(shape) == 3, len(shape) == 4 and shape[-1] in (1, 3)
        if dtype != np.uint8 or not (gray or colour) or 0 in shape:
            raise ValueError(
                f"arr_0 in {self.path} is {dtype} {list(shape)}; uint8 [N, H, W, 1 or 3] or [N, H, W] with "
                "N > 0 is expected (pixels in [0, 255])"
            )
        for key in ("labels", "arr_1"):
            if self.labels is None and key in headers:
                self.labels = self._read_labels(key, *headers[key], count=shape[0])
        self.names = [f"arr_0[{index}]" for index in range(shape[0])]

    def _read_labels(self, key: str, shape: tuple[int, ...], dtype: np.dtype, *, count: int) -> list[int]:
        if shape != (count,) or dtype.kind not in "iu":
            raise ValueError(f"{key} in {self.path} is {dtype} {list(shape)}; {count} integers are expected")
        with np.load(self.path) as file:
            return file[key].tolist()

    def _open(self) -> IO[bytes]:
        return zipfile.ZipFile(self.path).open("arr_0.npy")

    def readers(self) -> Iterator[Callable[[], Pixels]]:
        with self._open() as stream:
            shape, _ = read_npy_header(stream)
            for _ in range(shape[0]):
                row = np.frombuffer(stream.read(int(np.prod(shape[1:]))), np.uint8).reshape(shape[1:])
                yield partial(_repeat_gray, row)


def read_image(source: Path | str | IO[bytes], background: str = WHITE) -> Pixels:
    """Decode a file as uint8 ``[H, W, 3]``, converted as :func:`image_kind` says.

    Raises:
        ValueError: when its values would be lost, see :func:`~mhla_diffusion.files.pictures.flat_picture`.
    """
    with open_picture(source) as image, one_if_large(3 * image.width * image.height):
        return np.asarray(flat_picture(image, background).convert("RGB"))


def image_kind(background: str = WHITE) -> SampleKind:
    """Describe images as samples.

    Args:
        background: colour behind transparent pixels, by its name in CSS or as #rrggbb.

    Raises:
        ValueError: for another.
    """
    background_color(background)
    return SampleKind(
        name="image",
        extensions=EXTENSIONS,
        read=partial(read_image, background=background),
        conversion=PICTURE_CONVERSION.format(background=background),
        published_count=50_000,
    )


def open_images(path: str | Path, background: str = WHITE) -> SampleSet:
    """Open the images of a set; none is decoded yet.

    Args:
        path: folder of images; npz of the ADM layout; zip, tar (webdataset) or parquet, or a folder of such
            files; folder that ``datasets`` saved; or ``hf://name``, ``hf://name:split`` of a dataset on the
            hub (split ``train`` when not given).
        background: colour behind transparent pixels.

    Raises:
        ValueError: when there is nothing at ``path``, no image in it, or it cannot be read.
    """
    kind = image_kind(background)
    if (dataset := open_dataset(path, kind)) is not None:
        return dataset
    path = Path(path)
    if (archives := open_archives(path, kind)) is not None:
        return archives
    if path.is_dir():
        return Folder(path, kind)
    found = file_kind(path)
    if found == "npz":
        return NpzImages(path, kind)
    raise ValueError(
        f"{path} is neither a folder of images nor an .npz file, zip, tar, parquet or dataset: "
        f"{describe_kind(found)}"
    )


def _repeat_gray(pixels: Pixels) -> Pixels:
    """Return ``[H, W]``, ``[H, W, 1]`` or ``[H, W, 3]`` as ``[H, W, 3]``."""
    return np.broadcast_to(pixels.reshape(*pixels.shape[:2], -1), (*pixels.shape[:2], 3))
