"""Sources of images: folders, Hugging Face datasets, tar files of WebDataset, arrays."""

from __future__ import annotations

import gzip
import tarfile
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets.folder import make_dataset

from ...files.arrays import npz_headers
from ...files.names import is_hidden
from ...files.pictures import EXTENSIONS, WHITE, background_color
from .buckets import Size, pipeline_sizes
from .captions import Caption, as_caption, read_captions, weighted_texts
from .images import ArrayImages, ImageFiles, ImageRows, require_labels
from .sources import Source


class ImageSource(Source):
    """Kind of source whose ``open()`` gives :class:`.images.Images`, or samples that are ready."""

    @abstractmethod
    def open(self, *, captioned: bool = False) -> Any:
        """Return what the source holds, not yet read.

        Args:
            captioned: with captions, in place of classes.

        Raises:
            ValueError: when it is not there, or has none of these.
        """


@dataclass(frozen=True, kw_only=True)
class PictureSource(ImageSource):
    """Images that are brought to a size.

    Args:
        flip: mirror each image with probability 1/2. For latents, cache both ways instead.
        sizes: height and width in pixels, for models of texts; the model's own square by default. With
            several, each image goes to the one nearest to its own shape, and a batch has images of one size.
            An image is resized to cover its size and cropped at the centre.
        aspect_ratios: in place of sizes, those that the pipelines of PixArt and Sana round to for this side,
            256, 512, 1024, 2048 or 4096.
        enlarge: take images that are smaller than the size they go to; otherwise they are named, skipped and
            counted.
        background: colour behind transparent pixels, by its name in CSS or as #rrggbb.

    Raises:
        ValueError: for a size below 1, a side without a table, or both, or another background.
    """

    flip: bool = False
    sizes: tuple[tuple[int, int], ...] = ()
    aspect_ratios: int | None = None
    enlarge: bool = True
    background: str = WHITE

    def __post_init__(self) -> None:
        background_color(self.background)
        if any(min(size) < 1 for size in self.sizes):
            raise ValueError(f"data.sizes must be pairs of height and width in pixels, got {self.sizes}")
        if self.aspect_ratios is not None:
            pipeline_sizes(self.aspect_ratios)
            if self.sizes:
                raise ValueError("data.aspect_ratios brings its own sizes: remove data.sizes, or it")


def sizes_of(data: Any, *default: Size) -> tuple[Size, ...]:
    """Return the sizes that the config of a :class:`PictureSource` asks for, or the default."""
    if data.aspect_ratios is not None:
        return pipeline_sizes(data.aspect_ratios)
    return tuple((height, width) for height, width in data.sizes) or default


def refuse_captions(path: str, captioned: bool) -> None:
    """Check that no captions are asked of a source that has classes alone.

    Raises:
        ValueError: otherwise.
    """
    if captioned:
        raise ValueError(
            f"{path} has classes and no captions, which models of texts need: take a folder with "
            "captions.csv, a dataset with a column of texts, tar files, or scenes"
        )


@dataclass(frozen=True)
class FolderImages(PictureSource):
    """Images in one subfolder per class, classes numbered by name; or, for models of texts, with captions.

    Args:
        path: of the folder, file or dataset.
        captions: CSV with the columns path, caption and perhaps weight, or JSONL with these keys; paths are
            relative to the folder, and lines of one path are several captions. By default captions.csv or
            captions.jsonl in it, or else a .txt beside each picture, each line a caption.
    """

    path: str
    captions: str | None = None

    def open(self, *, captioned: bool = False) -> ImageFiles:
        folder = Path(self.path)
        if not folder.is_dir():
            raise ValueError(f"image folder {folder} does not exist")
        if captioned:
            return self._open_captioned(folder)
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
        return ImageFiles(
            [path for path, _ in shown], [label for _, label in shown], class_names,
            background=self.background,
        )  # fmt: skip

    def _open_captioned(self, folder: Path) -> ImageFiles:
        listed = read_captions(folder, self.captions, extensions=EXTENSIONS)
        place = Path(self.captions or folder / "captions")
        return ImageFiles(
            [str(path) for path, _ in listed], captions=[caption for _, caption in listed],
            background=self.background, index=place.with_name(f"{place.name}.shapes.json"),
        )  # fmt: skip


def _is_below_hidden(file: Path, folder: Path) -> bool:
    return any(map(is_hidden, file.relative_to(folder).parts))


@dataclass(frozen=True, kw_only=True)
class RowSource(PictureSource):
    """Images in the rows of a table.

    Args:
        image_column, label_column: of the dataset; found by type if not given.
        text_column: of captions, each a text or a list of texts; dots lead into nested columns. The only
            column of texts if not given.
        weight_column: of lists of numbers, how often each of several captions is taken; alike if not given.
    """

    image_column: str | None = None
    label_column: str | None = None
    text_column: str | None = None
    weight_column: str | None = None

    def open_rows(self, path: str, rows: Any, *, captioned: bool) -> ImageRows:
        """Open a dataset.

        Raises:
            ValueError: when it has no such columns.
        """
        import datasets

        image = find_column(path, rows, "image_column", self.image_column, datasets.Image)
        try:  # as files, which are decoded here as everywhere
            rows = rows.cast_column(image, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(f"{path}: the column {image} holds no images: set data.image_column") from error
        if captioned:
            captions = self._captions(path, rows)
            return ImageRows(path, rows, image, captions=captions, background=self.background)
        return self._labelled(path, rows, image)

    def _labelled(self, path: str, rows: Any, image: str) -> ImageRows:
        import datasets

        label = find_column(path, rows, "label_column", self.label_column, datasets.ClassLabel)
        feature, labels = rows.features[label], list(rows[label])
        require_labels(path, labels, numbers=isinstance(feature, datasets.ClassLabel))
        if isinstance(feature, datasets.ClassLabel):
            names = list(feature.names)
            return ImageRows(path, rows, image, labels, names, background=self.background)
        if not all(isinstance(value, str | int | float) for value in labels):
            raise ValueError(
                f"{path}: the column {label} holds neither numbers nor names: set data.label_column to one "
                f"of {', '.join(rows.features)}"
            )
        values = sorted(set(labels))
        ids = {value: number for number, value in enumerate(values)}
        names = [str(value) for value in values]
        numbers = [ids[value] for value in labels]
        return ImageRows(path, rows, image, numbers, names, background=self.background)

    def _captions(self, path: str, rows: Any) -> list[Caption | None]:
        name = self.text_column
        if name is None:
            texts = [key for key, value in rows.features.items() if getattr(value, "dtype", "") == "string"]
            texts = [key for key in texts if not key.startswith("__")]  # of WebDataset's own
            name = texts[0] if len(texts) == 1 else None
        column = read_column(path, rows, "text_column", name)
        weights = (
            [None] * len(rows)
            if self.weight_column is None
            else read_column(path, rows, "weight_column", self.weight_column)
        )
        captions = []
        for number, (texts, weight) in enumerate(zip(column, weights, strict=True)):
            try:
                captions.append(as_caption(weighted_texts(texts, weight)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, row {number} of data.text_column {name}: {error}") from error
        return captions


def find_column(path: str, rows: Any, key: str, name: str | None, kind: type) -> str:
    """Return a column's name, or that of the first of a type.

    Raises:
        ValueError: when there is none.
    """
    features = rows.features
    found = [name] if name else [column for column in features if isinstance(features[column], kind)]
    if len(found) > 1:
        usual = key.removesuffix("_column")
        if usual not in found:
            raise ValueError(f"{path} has several: set data.{key} to one of {', '.join(found)}")
        found = [usual]
    if not found or found[0] not in features:
        raise ValueError(
            f"{path} has no {name or kind.__name__ + ' column'}: set data.{key} to one of "
            f"{', '.join(features)}"
        )
    return found[0]


def read_column(path: str, rows: Any, key: str, name: str | None) -> Sequence[Any]:
    """Read a column, of a nested one the part that the dots of its name lead to.

    Raises:
        ValueError: when there is none.
    """
    first, *parts = (name or "").split(".")
    features = rows.features.get(first)
    for part in parts:
        features = features.get(part) if isinstance(features, dict) else None
    if features is None:
        raise ValueError(
            f"{path} has no {name or 'single column of texts'}: set data.{key} to one of "
            f"{', '.join(rows.features)}"
        )
    values = rows[first]
    for part in parts:
        values = [value and value[part] for value in values]
    return list(values)


@dataclass(frozen=True)
class HuggingfaceImages(RowSource):
    """Dataset by its name, a folder that save_to_disk wrote, or one that load_dataset can read.

    Args:
        split: one of the dataset's.
    """

    path: str
    split: str = "train"

    def open(self, *, captioned: bool = False) -> ImageRows:
        import datasets

        path, split = self.path, self.split
        saved = any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))
        rows = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, split=split)
        if isinstance(rows, datasets.DatasetDict):
            if split not in rows:
                raise ValueError(f"{path} has no split {split!r}; its splits are {', '.join(rows)}")
            rows = rows[split]
        return self.open_rows(path, rows, captioned=captioned)


@dataclass(frozen=True)
class WebdatasetImages(RowSource):
    """Tar files of WebDataset: a folder of them, one, or a pattern. Copied once into the cache of datasets.

    A column is an extension in the tar files, as jpg, txt, cls or json.caption.
    """

    path: str

    def open(self, *, captioned: bool = False) -> ImageRows:
        import datasets

        path = Path(self.path)
        pattern = path / "*.tar" if path.is_dir() else path
        files = sorted(str(file) for file in pattern.parent.glob(pattern.name))
        if not files:
            raise ValueError(f"{self.path} holds no tar files: give a folder of them, one, or a pattern")
        try:
            rows = datasets.load_dataset("webdataset", data_files={"train": files}, split="train")
        except (datasets.exceptions.DatasetGenerationError, tarfile.TarError, ValueError) as error:
            raise ValueError(f"{self.path}: {error.__cause__ or error}") from error
        return self.open_rows(self.path, rows, captioned=captioned)


@dataclass(frozen=True)
class NpzImages(PictureSource):
    """Archive of arr_0 uint8 [N, H, W, C] or [N, H, W], and labels or arr_1 [N]."""

    path: str

    def open(self, *, captioned: bool = False) -> ArrayImages:
        refuse_captions(self.path, captioned)
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
class IdxImages(PictureSource):
    """Images as MNIST is published: train-images-idx3-ubyte and train-labels-idx1-ubyte, or .gz."""

    path: str
    split: str = "train"

    def open(self, *, captioned: bool = False) -> ArrayImages:
        refuse_captions(self.path, captioned)
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
