"""Sets of images or videos in folders and npz files: which there are, in which order, read how."""

from __future__ import annotations

import io
import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..files.manifest import MANIFEST, read_manifest
from ..optional import require

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class SampleKind:
    """What a set is of: images, or clips of videos.

    Args:
        name: of one sample, ``"image"`` or ``"video"``; with an s, the key of their rows in a manifest.
        extensions: of their files.
        read: decodes a file as uint8 ``[H, W, 3]`` or ``[F, H, W, 3]``; called in any thread.
        conversion: how pixels become RGB, in words.
        published_count: samples that published scores are of.
        sampling: which frames of a video are scored, in words; None for images.
    """

    name: str
    extensions: tuple[str, ...]
    read: Callable[[Path], Pixels]
    conversion: str
    published_count: int
    sampling: str | None = None


class SampleSet(Protocol):
    """An ordered, finite set of samples that are read one by one."""

    @property
    def path(self) -> Path | str:
        """Where it is, as it was asked for."""
        ...

    kind: SampleKind
    names: list[str]
    """What each sample is called, in the order in which they are read."""
    labels: list[int] | None
    """Class id of each sample, None when not known of all."""
    class_names: dict[int, str]
    """What class ids are called, as far as known."""
    prompts: dict[str, str]
    """The text that a sample was generated from, by name, as far as known."""
    manifest: dict[str, Any]
    """What the manifest says of the whole set: model, steps, guidance, ..."""
    unlisted: int
    """Samples in the folder that its manifest does not list, and that are left out."""

    def readers(self) -> Iterator[Callable[[], Pixels]]:
        """For each name a function that reads the sample, and may be called in any thread."""
        ...

    def file(self, name: str) -> Path | None:
        """The file of a sample, None when it has none of its own."""
        ...


@dataclass
class Folder:
    """All samples below a folder, sorted by path, or those that its manifest.json lists, in its order.

    Class ids come from the manifest, else from the subfolders in the order of their names (as torchvision's
    ImageFolder), when there are at least two and no sample lies outside them.

    Raises:
        ValueError: when the folder holds no sample or its manifest cannot be read.
    """

    path: Path
    kind: SampleKind
    names: list[str] = field(init=False)
    labels: list[int] | None = field(init=False, default=None)
    class_names: dict[int, str] = field(init=False, default_factory=dict)
    prompts: dict[str, str] = field(init=False, default_factory=dict)
    manifest: dict[str, Any] = field(init=False, default_factory=dict)
    unlisted: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.names = sorted(_find_files(self.path, self.kind.extensions))
        rows = self._read_manifest()
        if rows is not None:
            listed = [str(row["file"]) for row in rows]
            self.unlisted = len(set(self.names) - set(listed))
            self.names = listed
            self.prompts = {str(row["file"]): row["prompt"] for row in rows if row.get("prompt")}
            if all(isinstance(row.get("class_id"), int) for row in rows):
                self.labels = [row["class_id"] for row in rows]
                self.class_names = {
                    row["class_id"]: row["class_name"] for row in rows if row.get("class_name")
                }
        else:
            self._label_by_subfolder()
        if not self.names:
            raise ValueError(
                f"folder {self.path} holds no {self.kind.name} ({', '.join(self.kind.extensions)})"
            )

    def _read_manifest(self) -> list[dict[str, Any]] | None:
        manifest, key, path = read_manifest(self.path), f"{self.kind.name}s", self.path / MANIFEST
        if manifest is None:
            return None
        if key not in manifest:
            logger.warning("%s has no key '%s', so it is ignored and the whole folder read", path, key)
            return None
        rows = manifest.pop(key)
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "file" in row for row in rows):
            raise ValueError(f"'{key}' in {path} must be a list of rows that each have 'file'")
        self.manifest = manifest
        return rows

    def _label_by_subfolder(self) -> None:
        folders = [name.split("/")[0] if "/" in name else None for name in self.names]
        classes = sorted({folder for folder in folders if folder is not None})
        if None not in folders and len(classes) > 1:
            ids = {name: index for index, name in enumerate(classes)}
            self.labels = [ids[str(folder)] for folder in folders]
            self.class_names = dict(enumerate(classes))

    def readers(self) -> Iterator[Callable[[], Pixels]]:
        for name in self.names:
            yield partial(self.kind.read, self.path / name)

    def file(self, name: str) -> Path | None:
        return self.path / name


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
    """The images of a Hugging Face dataset: column ``image``, and ``label`` as class ids when there.

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
    """The images in a folder, in an npz of the ADM layout or in a dataset; none is decoded yet.

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


def holds_statistics(path: str | Path) -> bool:
    """Whether ``path`` is an npz with ``mu`` and ``sigma``."""
    return _npz_has(path, "mu", "sigma")


def holds_samples(path: str | Path) -> bool:
    """Whether ``path`` is something else than an npz of statistics alone, such as ADM's reference batches."""
    return _npz_has(path, "arr_0") or not holds_statistics(path)


def _npz_has(path: str | Path, *arrays: str) -> bool:
    path = Path(path)
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {f"{array}.npy" for array in arrays} <= set(archive.namelist())


def _repeat_gray(pixels: Pixels) -> Pixels:
    """``[H, W]``, ``[H, W, 1]`` or ``[H, W, 3]`` as ``[H, W, 3]``."""
    return np.broadcast_to(pixels.reshape(*pixels.shape[:2], -1), (*pixels.shape[:2], 3))


def _find_files(folder: Path, extensions: tuple[str, ...]) -> Iterator[str]:
    """Paths of files relative to ``folder``, without hidden ones; links are followed, loops not."""
    for root, directories, files in os.walk(folder, followlinks=True):
        here = Path(os.path.realpath(root))
        directories[:] = [
            name
            for name in directories
            if not name.startswith(".")
            and not here.is_relative_to(os.path.realpath(os.path.join(root, name)))
        ]
        for name in files:
            if name.lower().endswith(extensions) and not name.startswith("."):
                yield (Path(root) / name).relative_to(folder).as_posix()


def _read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array; leaves the stream at its first element."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if fortran:
        raise ValueError("arr_0 is stored in Fortran order: write it with numpy.ascontiguousarray")
    return shape, dtype
