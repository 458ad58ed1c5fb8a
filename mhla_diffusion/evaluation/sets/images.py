"""Sets of images in folders, npz files and datasets: which there are, in which order, read how."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from ...optional import require
from .samples import Folder, Pixels, SampleKind, SampleSet


@dataclass
class NpzImages:
    """Images in the npz layout of ADM: ``arr_0`` uint8 ``[N, H, W, C]`` or ``[N, H, W]``.

    ``labels`` or ``arr_1`` ``[N]`` are the class ids, when there. Images are streamed out of the archive, so
    that its size does not matter.

    Raises:
        ValueError: when the file cannot be read or has another layout.
    """

    path: Path
    names: list[str] = field(init=False)
    labels: list[int] | None = field(init=False, default=None)
    class_names: dict[int, str] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    unlisted: int = 0

    def __post_init__(self) -> None:
        self.kind = IMAGES
        with np.load(self.path) as file:
            if "arr_0" not in file:
                raise ValueError(f"{self.path} has no arr_0 (uint8 images), only {', '.join(file)}")
            label_key = next((key for key in ("labels", "arr_1") if key in file), None)
            labels = None if label_key is None else file[label_key]
        with self._open() as stream:
            shape, dtype = _read_npy_header(stream)
        gray, colour = len(shape) == 3, len(shape) == 4 and shape[-1] in (1, 3)
        if dtype != np.uint8 or not (gray or colour) or 0 in shape:
            raise ValueError(
                f"arr_0 in {self.path} is {dtype} {list(shape)}; uint8 [N, H, W, 1 or 3] or [N, H, W] with "
                "N > 0 is expected (pixels in [0, 255])"
            )
        if labels is not None:
            if labels.shape != shape[:1] or labels.dtype.kind not in "iu":
                raise ValueError(
                    f"{label_key} in {self.path} is {labels.dtype} {list(labels.shape)}; {shape[0]} integers "
                    "are expected"
                )
            self.labels = labels.tolist()
        self.names = [f"arr_0[{index}]" for index in range(shape[0])]

    def _open(self) -> IO[bytes]:
        return zipfile.ZipFile(self.path).open("arr_0.npy")

    def readers(self) -> Iterator[Callable[[], Pixels]]:
        with self._open() as stream:
            shape, _ = _read_npy_header(stream)
            for _ in range(shape[0]):
                row = np.frombuffer(stream.read(int(np.prod(shape[1:]))), np.uint8).reshape(shape[1:])
                yield partial(_repeat_gray, row)

    def file(self, name: str) -> Path | None:
        return None


@dataclass
class DatasetImages:
    """Images of a Hugging Face dataset: column ``image``, and ``label`` as class ids when there.

    Args:
        path: as it was asked for, in reports.
        dataset: one split.

    Raises:
        ValueError: when it has no column of images.
    """

    path: Path | str
    dataset: Any
    names: list[str] = field(init=False)
    labels: list[int] | None = field(init=False, default=None)
    class_names: dict[int, str] = field(init=False, default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    unlisted: int = 0

    def __post_init__(self) -> None:
        self.kind = IMAGES
        features = self.dataset.features
        columns = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
        if not columns:
            raise ValueError(f"{self.path} has no column of images, only {', '.join(features)}")
        self.column = columns[0]
        self.dataset = self.dataset.cast_column(self.column, type(features[self.column])(decode=False))
        self.names = [f"{self.column}[{index}]" for index in range(len(self.dataset))]
        if "label" in features:
            self.labels = list(self.dataset["label"])
            self.class_names = dict(enumerate(getattr(features["label"], "names", ())))

    def readers(self) -> Iterator[Callable[[], Pixels]]:
        for index in range(len(self.dataset)):
            yield partial(self._read, index)

    def _read(self, index: int) -> Pixels:
        encoded = self.dataset[index][self.column]
        return read_image(encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"]))

    def file(self, name: str) -> Path | None:
        return None


def read_image(path: Path | str | IO[bytes]) -> Pixels:
    """Decode a file as uint8 ``[H, W, 3]``, converted as ``IMAGES`` says."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):  # Pillow would clip 16-bit values at 255
            values = np.asarray(image).astype(np.int64)
            if values.min() < 0 or values.max() > 0xFFFF:
                raise ValueError(f"pixels from {values.min()} to {values.max()}; 0 to 65535 are expected")
            return _repeat_gray((values >> 8).astype(np.uint8))
        if image.mode == "F":
            raise ValueError("floating-point pixels have no defined range")
        return np.asarray(image.convert("RGB"))


IMAGES = SampleKind(
    name="image",
    extensions=(".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    read=read_image,
    conversion="RGB, 8 bits; grayscale repeated, palette looked up, alpha dropped, 16-bit grayscale divided "
    "by 256, first frame of an animation, EXIF orientation not applied (as clean-fid)",
    published_count=50_000,
)


def open_images(path: str | Path) -> SampleSet:
    """Open the images in a folder, in an npz of the ADM layout or in a dataset; none is decoded yet.

    Args:
        path: folder of images, npz, folder that ``datasets`` saved, or ``hf://name`` or ``hf://name:split``
            of a dataset on the hub (split ``train`` when not given).

    Raises:
        ValueError: when there is nothing at ``path``, no image in it, or it cannot be read.
    """
    if str(path).startswith("hf://"):
        name, _, split = str(path).removeprefix("hf://").partition(":")
        return DatasetImages(str(path), _load_dataset(name, split or "train"))
    path = Path(path)
    if (path / "dataset_info.json").is_file():
        return DatasetImages(path, require("datasets").load_from_disk(str(path)))
    if path.is_dir():
        return Folder(path, IMAGES)
    if path.suffix == ".npz" and path.is_file():
        try:
            return NpzImages(path)
        except (OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a whole npz file ({error}): write it again") from error
    raise ValueError(f"{path} is neither a folder of images nor an .npz file")


def _load_dataset(name: str, split: str) -> Any:
    try:
        return require("datasets").load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(f"the split {split} of the dataset {name} cannot be loaded: {error}") from error


def _repeat_gray(pixels: Pixels) -> Pixels:
    """Return ``[H, W]``, ``[H, W, 1]`` or ``[H, W, 3]`` as ``[H, W, 3]``."""
    return np.broadcast_to(pixels.reshape(*pixels.shape[:2], -1), (*pixels.shape[:2], 3))


def _read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type of an array; leaves the stream at its first element."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if fortran:
        raise ValueError("arr_0 is stored in Fortran order: write it with numpy.ascontiguousarray")
    return shape, dtype
