"""Labelled images from folders, Hugging Face datasets and arrays, as samples for training.

A sample is ``{"samples": float32 [C, H, W] in [-1, 1] or latents, "class_labels": int}``.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image
from torchvision.datasets.folder import make_dataset

from ...files.arrays import npz_headers
from ...files.names import is_hidden
from ...files.pictures import (
    DECODING_ERRORS,
    EXTENSIONS,
    WHITE,
    background_color,
    flat_picture,
    read_picture,
)
from .fingerprint import file_content, fingerprint, fingerprint_of, relative_names
from .sources import Source
from .stream import UnreadableSampleError

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
        """Read an image, of 8 bits in mode L or RGB, and its class."""
        ...


@dataclass
class ArrayImages:
    """Images in memory.

    Args:
        images: uint8 ``[N, H, W, C]`` or ``[N, H, W]``; a second or fourth channel is alpha.
        labels: ``[N]``, 0 to ``len(class_names) - 1``.
        origin: what to call them.
        class_names: the labels as text by default.
        background: see :class:`PictureSource`.

    Raises:
        ValueError: for images that are not uint8 of that shape, or labels that are not as many.
    """

    images: np.ndarray
    labels: np.ndarray
    origin: str
    class_names: list[str] = field(default_factory=list)
    background: str = WHITE

    def __post_init__(self) -> None:
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) not in (3, 4) or not len(self.images):
            raise ValueError(
                f"{self.origin}: images must be uint8 [N, H, W, C] or [N, H, W] with N > 0, got "
                f"{self.images.dtype} {list(shape)}"
            )
        if len(shape) == 4 and shape[-1] == 1:
            self.images = self.images[..., 0]
        if self.labels.shape != shape[:1] or self.labels.dtype.kind not in "iu":
            raise ValueError(
                f"{self.origin}: labels must be {shape[0]} integers >= 0, got {self.labels.dtype} "
                f"{list(self.labels.shape)}"
            )
        _require_labels(self.origin, self.labels.tolist())
        self.class_names = self.class_names or [str(i) for i in range(int(self.labels.max()) + 1)]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.origin}, image {index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        return flat_picture(Image.fromarray(self.images[index]), self.background), int(self.labels[index])

    def fingerprint(self) -> str:
        return fingerprint(self.labels.tolist(), lambda index: self.images[index].tobytes())


class ImageFiles:
    """Images in files.

    Args:
        files: path and class of each.
        class_names: by their numbers.
        background: see :class:`PictureSource`.
    """

    def __init__(
        self, files: Sequence[tuple[str, int]], class_names: list[str], background: str = WHITE
    ) -> None:
        self.files, self.class_names, self.background = files, class_names, background

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index][0]

    def read(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.files[index]
        return read_picture(path, self.background), label

    def fingerprint(self) -> str:
        paths = [path for path, _ in self.files]
        labels = [self.class_names[label] for _, label in self.files]
        samples = list(zip(relative_names(paths), labels, strict=True))
        return fingerprint(samples, lambda index: file_content(paths[index]))


class ImageRows:
    """Images in the rows of a Hugging Face dataset.

    Args:
        path: what to call it.
        rows: the dataset.
        image_column, label_column: names; found by type when None.
        background: see :class:`PictureSource`.

    Raises:
        ValueError: when it has no image or label column, the named ones are not there, or a row has no label.
    """

    def __init__(
        self,
        path: str,
        rows: Any,
        *,
        image_column: str | None,
        label_column: str | None,
        background: str = WHITE,
    ) -> None:
        import datasets

        self.path, self.rows, self.background = path, rows, background
        self.image_column = self._column("image_column", image_column, datasets.Image)
        self.label_column = self._column("label_column", label_column, datasets.ClassLabel)
        try:  # as files, which are decoded here as everywhere
            self.rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: the column {self.image_column} holds no images: set data.image_column"
            ) from error
        feature, labels = rows.features[self.label_column], list(rows[self.label_column])
        self._ids: dict[Any, int] | None = None
        _require_labels(path, labels, numbers=isinstance(feature, datasets.ClassLabel))
        if isinstance(feature, datasets.ClassLabel):
            self.class_names = list(feature.names)
        else:
            if not all(isinstance(label, str | int | float) for label in labels):
                raise ValueError(
                    f"{path}: the column {self.label_column} holds neither numbers nor names: set "
                    f"data.label_column to one of {', '.join(rows.features)}"
                )
            values = sorted(set(labels))
            self._ids = {value: number for number, value in enumerate(values)}
            self.class_names = [str(value) for value in values]

    def _column(self, key: str, name: str | None, kind: type) -> str:
        features = self.rows.features
        found = [name] if name else [column for column in features if isinstance(features[column], kind)]
        if len(found) > 1:
            usual = key.removesuffix("_column")
            if usual not in found:
                raise ValueError(f"{self.path} has several: set data.{key} to one of {', '.join(found)}")
            found = [usual]
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
        label, image = row[self.label_column], row[self.image_column]
        if image is None:
            raise ValueError("the row has no picture")
        file = image["path"] if image["bytes"] is None else BytesIO(image["bytes"])
        return read_picture(file, self.background), int(label) if self._ids is None else self._ids[label]

    def fingerprint(self) -> str:
        def content(index: int) -> bytes:
            image = self.rows[index][self.image_column] or {"bytes": b"", "path": ""}
            return file_content(image["path"]) if image["bytes"] is None else image["bytes"]

        return fingerprint(list(self.rows[self.label_column]), content)


def _require_labels(origin: str, labels: Sequence[Any], *, numbers: bool = True) -> None:
    """Check that every row has a label; data sets write None or -1 where there is none.

    Raises:
        ValueError: that names the first row without one.
    """
    without = [row for row, label in enumerate(labels) if label is None or (numbers and label < 0)]
    if without:
        more = f" (and {len(without) - 1:,} more rows have none)" if len(without) > 1 else ""
        raise ValueError(
            f"{origin}, row {without[0]}: the label is {labels[without[0]]}{more}; take out the rows without "
            "labels, or choose another split or file"
        )


@dataclass(frozen=True, kw_only=True)
class ImageSource(Source):
    """Kind of source whose ``open()`` gives :class:`LabelledImages`, or samples that are ready.

    Args:
        flip: mirror each image with probability 1/2. For latents, cache both ways instead.
    """

    flip: bool = False


@dataclass(frozen=True, kw_only=True)
class PictureSource(ImageSource):
    """Kind of source of pictures that may be transparent.

    Args:
        background: colour behind transparent pixels, by its name in CSS or as #rrggbb.

    Raises:
        ValueError: for another.
    """

    background: str = WHITE

    def __post_init__(self) -> None:
        background_color(self.background)


@dataclass(frozen=True)
class FolderImages(PictureSource):
    """Images in one subfolder per class, classes numbered in the order of their names.

    Args:
        path: of the folder, file or dataset.
    """

    path: str

    def open(self) -> ImageFiles:
        folder = Path(self.path)
        if not folder.is_dir():
            raise ValueError(f"image folder {folder} does not exist")
        class_names = sorted(
            entry.name for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name)
        )
        ids = {name: number for number, name in enumerate(class_names)}
        try:
            files = make_dataset(folder, class_to_idx=ids, extensions=EXTENSIONS)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"image folder {folder} must have one subfolder per class, each with images: {error}; "
                "without classes put all of them into one subfolder"
            ) from error
        # One class could have a hidden folder below it, with copies of its images.
        shown = [(file, label) for file, label in files if not _is_below_hidden(Path(file), folder)]
        return ImageFiles(shown, class_names, self.background)


def _is_below_hidden(file: Path, folder: Path) -> bool:
    return any(map(is_hidden, file.relative_to(folder).parts))


@dataclass(frozen=True)
class HuggingfaceImages(PictureSource):
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
        return ImageRows(
            path,
            rows,
            image_column=self.image_column,
            label_column=self.label_column,
            background=self.background,
        )


@dataclass(frozen=True)
class NpzImages(PictureSource):
    """Archive of arr_0 uint8 [N, H, W, C] or [N, H, W], and labels or arr_1 [N]."""

    path: str

    def open(self) -> ArrayImages:
        path = Path(self.path)
        if not path.is_file():
            raise ValueError(f"image archive {path} does not exist")
        names = npz_headers(path)
        label_key = next((key for key in ("labels", "arr_1") if key in names), None)
        if "arr_0" not in names or label_key is None:
            raise ValueError(f"{path} must hold arr_0 and labels (or arr_1), it holds {', '.join(names)}")
        with np.load(path) as arrays:
            return ArrayImages(
                arrays["arr_0"], arrays[label_key], origin=str(path), background=self.background
            )


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

    def fingerprint(self) -> str | None:
        return fingerprint_of(self.images)

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        try:
            image, label = self.images.read(index)
            image = image.convert(_MODES[self.channels])
        except DECODING_ERRORS as error:
            raise UnreadableSampleError(f"{self.images.name(index)}: {error}") from error
        if min(image.size) != self.size:
            image = tvf.resize(image, [self.size], tvf.InterpolationMode.BICUBIC)
        pixels = tvf.pil_to_tensor(tvf.center_crop(image, [self.size]))
        if self.flip and torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(-1)
        return {"samples": pixels.float() / 127.5 - 1, "class_labels": label}
