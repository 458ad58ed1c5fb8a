"""Sets of samples, whatever these are: what every set has, those in folders, and what is said of one."""

from __future__ import annotations

import logging
import os
import re
import threading
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...files.arrays import file_kind, require_regular
from ...files.manifest import (
    MANIFEST,
    manifest_requests,
    manifest_rows,
    read_manifest,
    require_inside,
)
from ...files.names import is_hidden
from ...files.sums import SUMS, matches, read_sums

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]

EARLIER_CONVERSIONS = {
    "image": "RGB, 8 bits; grayscale repeated, palette looked up, alpha dropped, 16-bit grayscale divided "
    "by 256, first frame of an animation, EXIF orientation not applied (as clean-fid)",
    "video": "RGB, 8 bits, as the decoder gives it; grayscale repeated",
}
"""What earlier versions said of a kind: samples of the same pixels have the same features and scores."""

_LARGE = 96 << 20
_one_large = threading.Lock()


def one_if_large(nbytes: int) -> AbstractContextManager[Any]:
    """Let one thread at a time work on a sample whose pixels take so many bytes, when these are many."""
    return _one_large if nbytes > _LARGE else nullcontext()


@dataclass(frozen=True)
class SampleKind:
    """Kind of samples: images, or clips of videos.

    Args:
        name: of one sample, ``"image"`` or ``"video"``; with an s, the key of their rows in a manifest.
        extensions: of their files.
        read: decodes a file, of images also an open one, as uint8 ``[H, W, 3]`` or ``[F, H, W, 3]``; called
            in any thread, of videos with ``called`` where the name of the file is not enough.
        conversion: how pixels become RGB, in words.
        published_count: samples that published scores are of.
        sampling: which frames of a video are scored, in words; None for images.
    """

    name: str
    extensions: tuple[str, ...]
    read: Callable[..., Pixels]
    conversion: str
    published_count: int
    sampling: str | None = None


@dataclass
class SampleSet(ABC):
    """Ordered, finite set of samples that are read one by one.

    Args:
        path: of the set, as it was asked for.
        kind: of its samples.

    Attributes:
        names: what each sample is called, in the order in which they are read.
        labels: class id of each sample, None when not known of all.
        class_names: what class ids are called, as far as known.
        ids_by_position: whether class ids are but the places of subfolders in the order of their names.
        prompts: the text that a sample was generated from, by name, as far as known.
        manifest: what the manifest says of the whole set: model, steps, guidance, ..., and a summary of what
            its rows say.
        unlisted: samples in the folder that its manifest does not list, and that are left out.
        left_out: files that are no samples of this kind, by their suffix.
        frame_rates: frames per second of its videos, each rate once; empty when not known.
        notes: sentences that have to be said of the set beside its scores.
        group: samples behind each other that belong together, as the frames of one video.
    """

    path: Path | str
    kind: SampleKind
    names: list[str] = field(init=False, default_factory=list)
    labels: list[int] | None = field(init=False, default=None)
    class_names: dict[int, str] = field(init=False, default_factory=dict)
    ids_by_position: bool = field(init=False, default=False)
    prompts: dict[str, str] = field(init=False, default_factory=dict)
    manifest: dict[str, Any] = field(init=False, default_factory=dict)
    unlisted: int = field(init=False, default=0)
    left_out: dict[str, int] = field(init=False, default_factory=dict)
    frame_rates: list[float] = field(init=False, default_factory=list)
    notes: list[str] = field(init=False, default_factory=list)
    group: int = field(init=False, default=1)

    @abstractmethod
    def readers(self) -> Iterator[Callable[[], Pixels]]:
        """Yield for each name a function that reads the sample, and may be called in any thread."""

    def file(self, name: str) -> Path | None:
        """Return the file of a sample, None when it has none of its own."""
        return None

    @cached_property
    def names_repeat(self) -> bool:
        """Return whether samples of several folders are called alike: only their paths tell them apart."""
        return len({PurePosixPath(name).name for name in self.names}) < len(self.names)

    def called(self, name: str) -> dict[str, str]:
        """Return what to tell the reader of a video, whose clip begins by what it is called."""
        by_path = self.kind.sampling is not None and self.names_repeat
        return {"called": PurePosixPath(name).as_posix()} if by_path else {}

    def label_by_subfolder(self) -> None:
        """Take the subfolders for classes (as torchvision's ImageFolder), unless they are but shards."""
        folders = [name.split("/")[0] if "/" in name else None for name in self.names]
        classes = sorted({folder for folder in folders if folder is not None})
        if None in folders or len(classes) < 2:
            return
        if self.kind.sampling and len({PurePosixPath(name).name for name in self.names}) == 1:
            return  # 000/video.mp4, 001/video.mp4: a folder for each video
        if all(_SHARD.fullmatch(name) for name in classes):
            logger.info(
                "%s: the subfolders %s ... are taken for shards by their names, not for classes",
                self.path,
                ", ".join(classes[:3]),
            )
            return
        ids = {name: index for index, name in enumerate(classes)}
        self.labels, self.ids_by_position = [ids[str(folder)] for folder in folders], True
        self.class_names = dict(enumerate(classes))

    def take_manifest(self, manifest: dict[str, Any], source: str) -> list[dict[str, Any]] | None:
        """Keep what a manifest says of the whole set; return its rows, None when it is of other samples."""
        key = f"{self.kind.name}s"
        if key not in manifest:
            logger.warning("%s has no key '%s', so it is ignored and the whole set read", source, key)
            return None
        self.manifest = {name: value for name, value in manifest.items() if name != key}
        return manifest_rows(manifest, key, source)

    def take_rows(self, rows: list[dict[str, Any]]) -> None:
        """Take names, prompts and classes from the rows of a manifest."""
        self.manifest |= manifest_requests(rows)
        listed = [row["file"] for row in rows]
        self.unlisted = len(set(self.names) - set(listed))
        self.names = listed
        self.prompts = {row["file"]: str(row["prompt"]) for row in rows if row.get("prompt")}
        if all(isinstance(row.get("class_id"), int) for row in rows):
            self.labels = [row["class_id"] for row in rows]
            self.class_names = {
                row["class_id"]: str(row["class_name"]) for row in rows if row.get("class_name")
            }
        elif self.prompts:  # of texts: subfolders are categories, as those of MJHQ-30K
            self.label_by_subfolder()

    def note_left_out(self, others: Iterable[str]) -> None:
        """Count files that are no samples, without those that go with samples, such as captions."""
        paths = map(PurePosixPath, others)
        suffixes = (path.suffix.lower() for path in paths if path.name != SUMS)
        found = Counter(suffix or "(no suffix)" for suffix in suffixes if suffix not in _SIDECARS)
        self.left_out = dict(found.most_common())
        if found:
            listed = ", ".join(f"{count:,} {suffix}" for suffix, count in list(self.left_out.items())[:8])
            self.notes.append(f"Files that are not read as {self.kind.name}s are left out: {listed}.")


# Of StyleGAN's and EDM's dataset_tool (00000/, 00001/), and what people call parts.
_SHARD = re.compile(r"\d{5,}|(shard|part|chunk|batch|rank|worker|gpu|split)s?[-_ ]?\d+", re.IGNORECASE)
_SIDECARS = {
    *(".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".yaml", ".yml", ".toml", ".html", ".log", ".cls"),
    *(".npz", ".npy", ".pt", ".safetensors", ".parquet", ".srt", ".vtt", ".xml", ".py", ".sh"),
}  # fmt: skip


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
        left_out: files that are no samples of this kind, by their suffix.
        frame_rates: frames per second of its videos, each rate once; empty when not known.
        statistics_sha256: hash of the statistics that stand for it, where they do not state a fingerprint.
        sizes: height x width of the scored samples as they are stored, the most frequent first, and how many
            have it.
    """

    source: str
    count: int | None
    fingerprint: str | None
    skipped: list[SkippedFile] = field(default_factory=list)
    duplicates: int = 0
    copies: int = 0
    unlisted: int = 0
    manifest: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    frame_rates: list[float] = field(default_factory=list)
    statistics_sha256: str | None = None
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass
class Folder(SampleSet):
    """Samples below a folder, sorted by path, or those that its manifest.json lists, in its order.

    Class ids come from the manifest, else from the subfolders in the order of their names (as torchvision's
    ImageFolder), when there are at least two and no sample lies outside them.

    Samples that SHA256SUMS lists, which generation writes and sha256sum can write, are held against it: most
    decoders take a file of some exchanged bytes for another picture.

    Raises:
        ValueError: when the folder holds no sample or its manifest cannot be read.
    """

    path: Path
    sums: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.sums = read_sums(self.path) or {}
        found = sorted(find_files(self.path))
        self.names = [name for name in found if name.lower().endswith(self.kind.extensions)]
        samples = set(self.names)
        self.note_left_out(name for name in found if name not in samples)
        rows = self._read_manifest()
        if rows is None:
            self.label_by_subfolder()
        else:
            self.take_rows(rows)
        if not self.names:
            raise ValueError(
                f"folder {self.path} holds no {self.kind.name} ({', '.join(self.kind.extensions)})"
                + (f". {self.notes[0]} mhla evaluate has image and video" if self.left_out else "")
            )
        self._note_links()
        inner = sorted(name.rpartition("/")[0] for name in found if name.endswith(f"/{MANIFEST}"))
        if rows is None and len(inner) > 1:
            listed = ", ".join(inner[:3]) + (" ..." if len(inner) > 3 else "")
            self.notes.append(f"It holds {len(inner)} sets with a {MANIFEST} each ({listed}), taken for one.")

    def _read_manifest(self) -> list[dict[str, Any]] | None:
        manifest = read_manifest(self.path)
        rows = None if manifest is None else self.take_manifest(manifest, str(self.path / MANIFEST))
        if rows is not None:
            require_inside(rows, self.path)
        return rows

    def _note_links(self) -> None:
        """Say how many files lie elsewhere: links that the owner of the folder made are followed."""
        place = os.path.realpath(self.path)
        inside = lru_cache(maxsize=1)(lambda parent: _lies_in(parent, place))
        count = sum(
            not (_lies_in(file, place) if os.path.islink(file) else inside(os.path.dirname(file)))
            for file in (os.path.join(self.path, name) for name in self.names)
        )
        if count:
            self.notes.append(f"{count:,} of the files are links to places outside of the folder.")

    def readers(self) -> Iterator[Callable[[], Pixels]]:
        for name in self.names:
            yield partial(self._read, name)

    def _read(self, name: str) -> Pixels:
        path = self.path / name
        if path.is_dir():
            return self.kind.read(path, **self.called(name))
        digest = self.sums.get(name)
        if digest is not None and not matches(require_regular(path), digest):
            raise ValueError(
                f"not the file that {SUMS} beside it records: restore or make it again; where it was changed "
                f"on purpose, remove {SUMS}"
            )
        return self.kind.read(require_regular(path), **self.called(name))

    def file(self, name: str) -> Path | None:
        return self.path / name


def common_classes(real: SampleSet | None, generated: SampleSet) -> tuple[list[str], list[str]] | None:
    """Return the class of each sample of both sets, None when classes are not known or match in no way.

    Classes are matched by name when the sets have names in common, else by id. Subfolders have no ids, but
    those that a model was trained on with torchvision's ImageFolder: there the id is the place of a subfolder
    in the order of the names. They are matched with stated ids so, when there are as many subfolders.
    """
    if real is None or real.labels is None or generated.labels is None:
        return None
    by_name = not set(real.class_names.values()).isdisjoint(generated.class_names.values())
    if not by_name and not _ids_match(real, generated):
        return None
    names = real.class_names | generated.class_names
    classes = []
    for samples in (real, generated):
        known = samples.class_names if by_name else names
        classes.append([known.get(label, f"class {label}") for label in samples.labels or ()])
    return None if set(classes[0]).isdisjoint(classes[1]) else (classes[0], classes[1])


def class_notes(real: SampleSet | None, generated: SampleSet) -> list[str]:
    """Say how classes are matched, where this is not by their names."""
    if real is None or real.labels is None or generated.labels is None:
        return []
    if common_classes(real, generated) is None:
        return ["Classes of both sets are known, but match neither by name nor by id: no score by class."]
    by_name = not set(real.class_names.values()).isdisjoint(generated.class_names.values())
    if by_name or not (real.ids_by_position or generated.ids_by_position):
        return []
    return ["Class ids are matched with subfolders in the order of their names (as torchvision does)."]


def _ids_match(real: SampleSet, generated: SampleSet) -> bool:
    if real.ids_by_position and generated.ids_by_position:
        return False
    for folders, stated in ((real, generated), (generated, real)):
        if folders.ids_by_position and not set(stated.labels or ()) <= set(folders.class_names):
            return False
    return True


def holds_statistics(path: str | Path) -> bool:
    """Check that ``path`` is an npz with ``mu`` and ``sigma``, or a file of torch-fidelity or EDM2."""
    return file_kind(path) in ("torch", "pickle") or _npz_has(path, "mu", "sigma")


def holds_samples(path: str | Path) -> bool:
    """Check that ``path`` is no file of statistics alone; ADM's reference batches hold images too."""
    return _npz_has(path, "arr_0") or not holds_statistics(path)


def _npz_has(path: str | Path, *arrays: str) -> bool:
    if file_kind(path) != "npz":
        return False
    with zipfile.ZipFile(path) as archive:
        return {f"{array}.npy" for array in arrays} <= set(archive.namelist())


def _lies_in(path: str, place: str) -> bool:
    real = os.path.realpath(path)
    return real == place or real.startswith(place.rstrip(os.sep) + os.sep)


def find_files(folder: Path) -> list[str]:
    """List paths of files relative to ``folder``, without hidden ones; links are followed, loops not.

    Raises:
        ValueError: when a subfolder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(
            f"the folder {error.filename} cannot be read ({error.strerror}): make it readable, or take it out"
        ) from error

    found = []
    for root, directories, files in os.walk(folder, followlinks=True, onerror=refuse):
        here = os.path.realpath(root)
        directories[:] = [
            name
            for name in directories
            if not is_hidden(name) and not _lies_in(here, os.path.realpath(os.path.join(root, name)))
        ]
        below = os.path.relpath(root, folder)
        prefix = "" if below == "." else f"{below}/"
        found += [prefix + name for name in files if not is_hidden(name)]
    return found
