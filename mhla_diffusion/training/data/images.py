"""Labelled images from folders, Hugging Face datasets and arrays, as samples for training.

A sample is ``{"samples": float32 [C, H, W] in [-1, 1] or latents, "class_labels": int}``.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from .sources import Source
from .stream import UnreadableSampleError

# What PIL raises for a file that is cut short, broken, no image, or absurdly large.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
_MODES = {1: "L", 3: "RGB"}


@runtime_checkable
class LabelledImages(Protocol):
    """Images that are read one by one."""

    class_names: list[str]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return what to call an image in a message."""
        ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Read an image and its class."""
        ...


@dataclass
class ArrayImages:
    """Images in memory.

    Args:
        images: uint8 ``[N, H, W, C]`` or ``[N, H, W]``.
        labels: ``[N]``, 0 to ``len(class_names) - 1``.
        origin: what to call them.
        class_names: the labels as text by default.

    Raises:
        ValueError: for images that are not uint8 of that shape, or labels that are not as many.
    """

    images: np.ndarray
    labels: np.ndarray
    origin: str
    class_names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) not in (3, 4) or not len(self.images):
            raise ValueError(
                f"{self.origin}: images must be uint8 [N, H, W, C] or [N, H, W] with N > 0, got "
                f"{self.images.dtype} {list(shape)}"
            )
        if len(shape) == 4 and shape[-1] == 1:
            self.images = self.images[..., 0]
        if self.labels.shape != shape[:1] or self.labels.dtype.kind not in "iu" or self.labels.min() < 0:
            raise ValueError(
                f"{self.origin}: labels must be {shape[0]} integers >= 0, got {self.labels.dtype} "
                f"{list(self.labels.shape)}"
            )
        self.class_names = self.class_names or [str(i) for i in range(int(self.labels.max()) + 1)]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.origin}, image {index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


class ImageFiles:
    """Images in files.

    Args:
        files: path and class of each.
        class_names: by their numbers.
    """

    def __init__(self, files: Sequence[tuple[str, int]], class_names: list[str]) -> None:
        self.files, self.class_names = files, class_names

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index][0]

    def read(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.files[index]
        with Image.open(path) as image:
            image.load()
        return image, label


class ImageRows:
    """Images in the rows of a Hugging Face dataset.

    Args:
        path: what to call it.
        rows: the dataset.
        image_column, label_column: names; found by type when None.

    Raises:
        ValueError: when it has no image or label column, or the named ones are not there.
    """

    def __init__(self, path: str, rows: Any, *, image_column: str | None, label_column: str | None) -> None:
        import datasets

        self.path, self.rows = path, rows
        self.image_column = self._column("image_column", image_column, datasets.Image)
        self.label_column = self._column("label_column", label_column, datasets.ClassLabel)
        feature = rows.features[self.label_column]
        self._ids: dict[Any, int] | None = None
        if isinstance(feature, datasets.ClassLabel):
            self.class_names = list(feature.names)
        else:
            values = sorted(set(rows[self.label_column]))
            self._ids = {value: number for number, value in enumerate(values)}
            self.class_names = [str(value) for value in values]

    def _column(self, key: str, name: str | None, kind: type) -> str:
        features = self.rows.features
        found = [name] if name else [column for column in features if isinstance(features[column], kind)]
        if not found or found[0] not in features:
            raise ValueError(
                f"{self.path} has no {name or kind.__name__ + ' column'}: set data.{key} to one of "
                f"{', '.join(features)}"
            )
        return found[0]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.path}, row {index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        row = self.rows[index]
        label = row[self.label_column]
        return row[self.image_column], int(label) if self._ids is None else self._ids[label]


@dataclass(frozen=True, kw_only=True)
class ImageSource(Source):
    """Kind of source whose ``open()`` gives :class:`LabelledImages`, or samples that are ready.

    Args:
        flip: mirror each image with probability 1/2. For latents, cache both ways instead.
    """

    flip: bool = False


@dataclass(frozen=True)
class FolderImages(ImageSource):
    """Images in one subfolder per class, classes numbered in the order of their names.

    Args:
        path: of the folder, file or dataset.
    """

    path: str

    def open(self) -> ImageFiles:
        folder = Path(self.path)
        if not folder.is_dir():
            raise ValueError(f"image folder {folder} does not exist")
        class_names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        ids = {name: number for number, name in enumerate(class_names)}
        try:
            files = make_dataset(folder, class_to_idx=ids, extensions=IMG_EXTENSIONS)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"image folder {folder} must have one subfolder per class, each with images "
                f"({', '.join(IMG_EXTENSIONS)}): {error}"
            ) from error
        return ImageFiles(files, class_names)


@dataclass(frozen=True)
class HuggingfaceImages(ImageSource):
    """Dataset by its name, a folder that save_to_disk wrote, or one that load_dataset can read.

    Args:
        split: one of the dataset's.
        image_column, label_column: of the dataset; found by type if not given.
    """

    path: str
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None

    def open(self) -> ImageRows:
        import datasets

        path, split = self.path, self.split
        saved = any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))
        rows = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, split=split)
        if isinstance(rows, datasets.DatasetDict):
            if split not in rows:
                raise ValueError(f"{path} has no split {split!r}; its splits are {', '.join(rows)}")
            rows = rows[split]
        return ImageRows(path, rows, image_column=self.image_column, label_column=self.label_column)


@dataclass(frozen=True)
class NpzImages(ImageSource):
    """Archive of arr_0 uint8 [N, H, W, C] or [N, H, W], and labels or arr_1 [N]."""

    path: str

    def open(self) -> ArrayImages:
        path = Path(self.path)
        if not path.is_file():
            raise ValueError(f"image archive {path} does not exist")
        with np.load(path) as arrays:
            label_key = next((key for key in ("labels", "arr_1") if key in arrays), None)
            if "arr_0" not in arrays or label_key is None:
                raise ValueError(
                    f"{path} must hold arr_0 and labels (or arr_1), it holds {', '.join(arrays)}"
                )
            return ArrayImages(arrays["arr_0"], arrays[label_key], origin=str(path))


@dataclass(frozen=True)
class IdxImages(ImageSource):
    """Images as MNIST is published: train-images-idx3-ubyte and train-labels-idx1-ubyte, or .gz."""

    path: str
    split: str = "train"

    def open(self) -> ArrayImages:
        prefix = {"train": "train", "test": "t10k"}.get(self.split)
        if prefix is None:
            raise ValueError(f"data.split of idx files is train or test, got {self.split!r}")
        images, labels = (
            _read_idx(Path(self.path) / f"{prefix}-{name}")
            for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
        )
        return ArrayImages(images, labels, origin=self.path)


def _read_idx(path: Path) -> np.ndarray:
    """Bytes in the shape that the file states."""
    found = next((p for p in (path, path.with_name(f"{path.name}.gz")) if p.is_file()), None)
    if found is None:
        raise ValueError(f"{path} does not exist, nor {path.name}.gz")
    content = found.read_bytes()
    if found.suffix == ".gz":
        content = gzip.decompress(content)
    zeros, kind, axes = content[:2], content[2:3], content[3] if len(content) > 3 else 0
    shape = np.frombuffer(content, ">u4", axes, offset=4) if len(content) >= 4 + 4 * axes else np.zeros(0)
    if zeros != b"\0\0" or kind != b"\x08" or len(content) != 4 + 4 * axes + np.prod(shape, dtype=int):
        raise ValueError(f"{found} is no idx file of bytes, or not whole")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape.astype(int))


class ImageSamples:
    """Images, resized, cropped to a square and scaled to [-1, 1].

    Args:
        images: where they come from.
        channels: 1 (gray) or 3 (RGB); images are converted.
        size: side of the square in pixels. The shorter side is resized to it, the longer cropped at both
            ends.
        flip: mirror with probability 1/2.

    Raises:
        ValueError: for another number of channels.
    """

    buckets = None

    def __init__(self, images: LabelledImages, *, channels: int, size: int, flip: bool = False) -> None:
        if channels not in _MODES:
            raise ValueError(
                f"images have 1 or 3 channels, but model.in_channels is {channels}; for latents, cache them "
                "with mhla cache-latents and set data.source to latents"
            )
        self.images, self.channels, self.size, self.flip = images, channels, size, flip
        self.class_names = images.class_names

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return self.images.name(index)

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        try:
            image, label = self.images.read(index)
            image = image.convert(_MODES[self.channels])
        except _DECODING_ERRORS as error:
            raise UnreadableSampleError(f"{self.images.name(index)}: {error}") from error
        if min(image.size) != self.size:
            image = tvf.resize(image, [self.size], tvf.InterpolationMode.BICUBIC)
        pixels = tvf.pil_to_tensor(tvf.center_crop(image, [self.size]))
        if self.flip and torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(-1)
        return {"samples": pixels.float() / 127.5 - 1, "class_labels": label}
