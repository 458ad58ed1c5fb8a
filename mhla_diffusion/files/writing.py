"""Writing files and folders so that none is ever half-written, and none overwritten unasked.

Everything is written under a hidden name of its own beside its place, flushed to disk and then renamed, so
that a kill or a full disk in the middle leaves what was there before.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def write_file(path: str | os.PathLike[str], content: bytes | str | Callable[[Path], Any]) -> None:
    """Write a file; its folder is made when it is not there.

    Args:
        path: where it goes. What stood there is replaced when the new file is whole.
        content: bytes, text (UTF-8), or a function that writes the file whose path it is called with; that
            has the suffix of ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Short, as the name of the file itself may be as long as the file system allows.
    temporary = path.with_name(f".{secrets.token_hex(8)}.partial{path.suffix}")
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        _flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def write_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Write a folder.

    Args:
        folder: where it goes. What stood there is replaced when the new one is whole.
        write: called with the folder to write into, which exists, is empty and has the same name.
    """
    temporary = start_writing(folder)
    try:
        write(temporary)
        commit(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary.parent, ignore_errors=True)
        raise


def start_writing(folder: Path) -> Path:
    """Make the empty folder to write into: under the same name, in a hidden one beside the place."""
    temporary = folder.parent / f"{_WRITING}{secrets.token_hex(8)}" / folder.name
    temporary.mkdir(parents=True)
    return temporary


def commit(temporary: Path, folder: Path) -> None:
    """Flush a folder that :func:`start_writing` gave to disk, and move it to its place."""
    for path in [*temporary.rglob("*"), temporary]:
        _flush(path)
    if folder.exists():
        folder.rename(temporary.with_name(f"{folder.name}.old"))
    temporary.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(temporary.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove what writes that were killed left in a folder of which this process is the only writer."""
    for path in folder.glob(f"{_WRITING}*"):
        shutil.rmtree(path)


def require_absent(paths: Sequence[Path], *, overwrite: bool = False) -> None:
    """Check that nothing would be overwritten.

    Raises:
        ValueError: when one of ``paths`` exists and ``overwrite`` is false.
    """
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise ValueError(
            f"{', '.join(existing)} already there: give another place, or ask for overwrite to replace it"
        )


def require_new_folder(folder: str | os.PathLike[str]) -> Path:
    """Check that a folder is not there yet.

    Raises:
        ValueError: when it is.
    """
    if Path(folder).exists():
        raise ValueError(f"{folder} is there already; choose another folder")
    return Path(folder)


def require_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder ``path``, made when it is not there.

    Raises:
        ValueError: when ``path`` is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; a folder is needed")
    path.mkdir(parents=True, exist_ok=True)
    return path


_WRITING = ".writing-"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
