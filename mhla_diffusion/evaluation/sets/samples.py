"""Sets of samples, whatever these are: what every set has, those in folders, and what is said of one."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...files.manifest import MANIFEST, read_manifest

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class SampleKind:
    """Kind of samples: images, or clips of videos.

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
    """Ordered, finite set of samples that are read one by one."""

    @property
    def path(self) -> Path | str:
        """Path of the set, as it was asked for."""
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
        """Yield for each name a function that reads the sample, and may be called in any thread."""
        ...

    def file(self, name: str) -> Path | None:
        """Return the file of a sample, None when it has none of its own."""
        ...


@dataclass(frozen=True)
class SkippedFile:
    """File that could not be read, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class SetSummary:
    """Summary of a set that was scored.

    Args:
        source: folder or file.
        count: samples that were scored; None when statistics do not state it.
        fingerprint: hash of these samples; None when statistics do not state it.
        skipped: files that could not be read.
        duplicates: scored samples with the same pixels as one before.
        copies: of generated samples, how many different ones have the same pixels as a real one.
        unlisted: samples in the folder that its manifest does not list, and that were left out.
        manifest: what the manifest says of the whole set.
    """

    source: str
    count: int | None
    fingerprint: str | None
    skipped: list[SkippedFile] = field(default_factory=list)
    duplicates: int = 0
    copies: int = 0
    unlisted: int = 0
    manifest: dict[str, Any] = field(default_factory=dict)


@dataclass
class Folder:
    """Samples below a folder, sorted by path, or those that its manifest.json lists, in its order.

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


def common_classes(real: SampleSet | None, generated: SampleSet) -> tuple[list[str], list[str]] | None:
    """Return the class of each sample of both sets, None when the sets have no class in common.

    Classes are matched by name when the sets have names in common, else by id.
    """
    if real is None or real.labels is None or generated.labels is None:
        return None
    by_name = not set(real.class_names.values()).isdisjoint(generated.class_names.values())
    names = real.class_names | generated.class_names
    classes = []
    for samples in (real, generated):
        known = samples.class_names if by_name else names
        classes.append([known.get(label, f"class {label}") for label in samples.labels or ()])
    return None if set(classes[0]).isdisjoint(classes[1]) else (classes[0], classes[1])


def holds_statistics(path: str | Path) -> bool:
    """Check that ``path`` is an npz with ``mu`` and ``sigma``."""
    return _npz_has(path, "mu", "sigma")


def holds_samples(path: str | Path) -> bool:
    """Check that ``path`` is not an npz of statistics alone; ADM's reference batches hold images too."""
    return _npz_has(path, "arr_0") or not holds_statistics(path)


def _npz_has(path: str | Path, *arrays: str) -> bool:
    path = Path(path)
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {f"{array}.npy" for array in arrays} <= set(archive.namelist())


def _find_files(folder: Path, extensions: tuple[str, ...]) -> Iterator[str]:
    """Yield paths of files relative to ``folder``, without hidden ones; links are followed, loops not."""
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
