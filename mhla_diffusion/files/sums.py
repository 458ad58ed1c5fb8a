"""SHA-256 of files, in the format of sha256sum: ``sha256sum -c SHA256SUMS`` checks a folder too."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .writing import disk_errors

SUMS = "SHA256SUMS"
# The star is of sha256sum --binary, the dot of what find lists.
_LINE = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *](\./)?(?P<name>.+)")


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def json_sha256(facts: Any) -> str:
    """Return the SHA-256 of facts as JSON, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def short_hash(facts: Any) -> str:
    """Name what was made from facts: the first 16 digits of :func:`json_sha256`."""
    return json_sha256(facts)[:16]


def record_sums(folder: Path, names: Iterable[str]) -> None:
    """Add files of a folder to its record. Several processes may do so at once.

    Raises:
        OSError: when the disk is full.
    """
    lines = "".join(f"{file_sha256(folder / name)}  {name}\n" for name in names).encode()
    path = folder / SUMS
    with disk_errors(path), open(path, "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":  # cut short, by a full disk
            lines = b"\n" + lines
        if file.write(lines) < len(lines):  # at once: others append too, and a kill may follow
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def record_all(folder: Path) -> None:
    """Record every file in a folder and below."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    record_sums(folder, [path.relative_to(folder).as_posix() for path in files])


def read_sums(folder: Path) -> dict[str, str] | None:
    """Return the recorded SHA-256 of each file of a folder, the last of a file recorded twice.

    Lines that are none are left out. None is returned without a record.
    """
    path = folder / SUMS
    if not path.is_file():
        return None
    lines = (_LINE.fullmatch(line) for line in path.read_text(errors="replace").split("\n"))
    return {line["name"]: line["digest"] for line in lines if line}


def damaged_files(folder: Path) -> list[str] | None:
    """List the files of a folder that are missing, changed or not in its record; None without a record.

    Hidden files need no record.
    """
    sums = read_sums(folder)
    if sums is None:
        return None
    there = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = {path.as_posix() for path in there if not path.name.startswith(".")} - {SUMS}
    return sorted(name for name in names | sums.keys() if not matches(folder / name, sums.get(name)))


def matches(path: Path, digest: str | None) -> bool:
    """Return True when a file is there and has this SHA-256."""
    return path.is_file() and file_sha256(path) == digest
