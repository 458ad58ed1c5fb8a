"""Sets in zip and tar archives (webdataset): pictures are read in them, videos unpacked one by one."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ...files.arrays import file_kind
from ...files.manifest import MANIFEST, parse_manifest
from ...files.names import is_hidden
from .samples import Pixels, SampleKind, SampleSet

LARGEST = 1 << 30
"""Bytes of a sample; more is no picture or clip but an archive that unpacks to fill the memory."""


class Member(NamedTuple):
    """File in an archive; ``offset`` where its bytes begin in a tar, None in a zip."""

    archive: Path
    name: str
    size: int
    offset: int | None


@dataclass
class Archives(SampleSet):
    """Samples in one archive or several, sorted by archive and by name.

    Classes and prompts come from a manifest.json, else from ``key.cls`` and ``key.txt`` beside ``key.jpg``
    (webdataset); else classes are the subfolders.

    Raises:
        ValueError: when an archive is damaged or holds no sample.
    """

    path: Path
    archives: list[Path]
    members: dict[str, Member] = field(init=False, default_factory=dict)
    zips: dict[Path, zipfile.ZipFile] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for archive in self.archives:
            if zipfile.is_zipfile(archive):
                self.zips[archive] = zipfile.ZipFile(archive)  # many threads may read one
            prefix = f"{archive.name}/" if len(self.archives) > 1 else ""
            for member in sorted(_list(archive), key=lambda member: member.name):
                self.members[prefix + member.name] = member
        visible = [name for name in self.members if not any(map(is_hidden, PurePosixPath(name).parts))]
        self.names = [name for name in visible if name.lower().endswith(self.kind.extensions)]
        samples = set(self.names)
        self.note_left_out(name for name in visible if name not in samples)
        if not self.names:
            raise ValueError(": ".join([f"{self.path} holds no {self.kind.name}", *self.notes]))
        texts = {name: self._beside(name, ".txt") for name in self.names}
        self.prompts = {name: text for name, text in texts.items() if text}
        manifest = self.members.get(MANIFEST)
        rows = None
        if manifest is not None:
            source = f"{MANIFEST} in {self.path}"
            rows = self.take_manifest(parse_manifest(self._content(manifest), source), source)
        if rows is None:
            self._take_classes()
        else:
            self.take_rows(rows)

    def _take_classes(self) -> None:
        stated = [self._beside(name, ".cls") for name in self.names]
        if all(text is not None and text.isdecimal() for text in stated):
            self.labels = [int(str(text)) for text in stated]
        elif len(self.archives) == 1:
            self.label_by_subfolder()

    def _beside(self, name: str, suffix: str) -> str | None:
        """Return the text of the file of the same key: what stands before the first dot of a file's name."""
        folder, slash, file = name.rpartition("/")
        member = self.members.get(f"{folder}{slash}{file.partition('.')[0]}{suffix}")
        if member is None or member.size > 1 << 16:
            return None
        return self._content(member).decode("utf-8", "replace").strip()

    def readers(self) -> Iterator[Callable[[], Pixels]]:
        for name in self.names:
            yield partial(self._read, name)

    def _read(self, name: str) -> Pixels:
        if (member := self.members.get(name)) is None:
            raise ValueError("it is listed in the manifest and not in the archive")
        content = self._content(member)
        if self.kind.sampling is None:
            return self.kind.read(io.BytesIO(content))
        with tempfile.TemporaryDirectory() as folder:  # decoders of videos want a path
            path = Path(folder) / PurePosixPath(member.name).name
            path.write_bytes(content)
            return self.kind.read(path, **self.called(name))

    def _content(self, member: Member) -> bytes:
        if member.size > LARGEST:
            raise ValueError(f"{member.name} has {member.size:,} bytes; at most {LARGEST:,} are read")
        if member.offset is None:
            try:
                return self.zips[member.archive].read(member.name)
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
                raise ValueError(f"{member.name} in {member.archive} cannot be read: {error}") from error
        descriptor = os.open(member.archive, os.O_RDONLY)
        try:
            return os.pread(descriptor, member.size, member.offset)
        finally:
            os.close(descriptor)


def open_archives(path: Path, kind: SampleKind) -> Archives | None:
    """Open a zip or tar, or all in a folder of nothing else; None when ``path`` is none.

    Raises:
        ValueError: when one is damaged or holds no sample.
    """
    if file_kind(path) in ("zip", "tar"):
        return Archives(path, kind, [path])
    visible = [entry for entry in path.iterdir() if not is_hidden(entry.name)] if path.is_dir() else []
    archives = sorted(entry for entry in visible if entry.suffix in (".zip", ".tar"))
    if not archives or any(entry.suffix not in (".zip", ".tar", ".json", ".txt") for entry in visible):
        return None
    for archive in archives:
        if file_kind(archive) not in ("zip", "tar"):
            raise ValueError(f"{archive} is neither a zip nor a tar file, or not whole: copy it again")
    return Archives(path, kind, archives)


def _list(archive: Path) -> list[Member]:
    """List the regular files of an archive: links and devices of a tar are none."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                files = [info for info in opened.infolist() if not info.is_dir()]
                return [Member(archive, info.filename, info.file_size, None) for info in files]
        with tarfile.open(archive, "r:") as tar:
            infos = list(tar)
        _require_end(archive, infos)
        return [Member(archive, info.name, info.size, info.offset_data) for info in infos if info.isreg()]
    except (OSError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise ValueError(f"{archive} is not a whole archive ({error}): write or copy it again") from error


def _require_end(archive: Path, infos: list[tarfile.TarInfo]) -> None:
    """Check that a tar ends after its last file: at a damaged header tarfile stops without a word."""
    end = max((info.offset_data + -(-info.size // 512) * 512 for info in infos), default=0)
    with open(archive, "rb") as file:
        file.seek(end)
        if file.read(512) != bytes(512):
            raise ValueError(f"it is cut short or damaged after {len(infos)} files")
