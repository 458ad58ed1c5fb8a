"""Fingerprints of data sets: the same wherever the data lie, another when the samples are others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

_LOOKED_INTO = 32
_BEGINNING = 1 << 16


def fingerprint_of(source: Any) -> str | None:
    """Return the fingerprint of what samples come from; None for data that are made, not read."""
    find = getattr(source, "fingerprint", None)
    return None if find is None else find()


def fingerprint(samples: Sequence[Any], content: Callable[[int], bytes]) -> str:
    """Hash what is known of every sample, and the content of a few that are evenly spread.

    Args:
        samples: what each is called and described by, without the place where it lies.
        content: of a sample, by its number.
    """
    digest = hashlib.sha256(f"{len(samples)}".encode())
    for sample in samples:
        digest.update(f"\n{sample!r}".encode("utf-8", "surrogateescape"))
    count = min(_LOOKED_INTO, len(samples))
    for place in range(count):
        digest.update(content(place * len(samples) // count))
    return digest.hexdigest()


def file_content(path: str | os.PathLike[str]) -> bytes:
    """Return the size and the beginning of a file; nothing when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return f"{os.fstat(file.fileno()).st_size} ".encode() + file.read(_BEGINNING)
    except OSError:
        return b""


def relative_names(files: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return names of files below the folder that they have in common."""
    paths = [os.path.abspath(file) for file in files]
    folder = os.path.dirname(paths[0]) if len(paths) == 1 else os.path.commonpath(paths)
    return [os.path.relpath(path, folder) for path in paths]
