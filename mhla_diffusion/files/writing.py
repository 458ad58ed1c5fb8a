"""Writing files and folders so that none is ever half-written, and none overwritten unasked.

Everything is written under a hidden name of its own beside its place, flushed to disk and then renamed, so
that a kill or a full disk in the middle leaves what was there before.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_file(path: str | os.PathLike[str], content: bytes | str | Callable[[Path], Any]) -> None:
    """Write a file; its folder is made when it is not there.

    Args:
        path: where it goes. What stood there is replaced when the new file is whole.
        content: bytes, text (UTF-8), or a function that writes the file whose path it is called with; that
            has the suffix of ``path``.

    Raises:
        OSError: when the disk is full or the file cannot be written, whatever the writer's own error was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Short, as the name of the file itself may be as long as the file system allows.
    temporary = path.with_name(f".{secrets.token_hex(8)}.partial{path.suffix}")
    try:
        with disk_errors(path):
            if callable(content):
                temporary.touch()
                mode = temporary.stat().st_mode
                content(temporary)
                temporary.chmod(mode)  # safetensors lets the owner alone read
            else:
                temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            _flush(temporary)
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # of a disk that takes nothing, which is what shall be told
            temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def write_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Write a folder.

    Args:
        folder: where it goes. What stood there is replaced when the new one is whole.
        write: called with the folder to write into, which exists, is empty and has the same name.

    Raises:
        OSError: as :func:`write_file`.
    """
    folder = Path(folder).resolve()  # what a link leads to is replaced, not the link
    temporary = start_writing(folder)
    try:
        with disk_errors(folder):
            write(temporary)
            commit(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary.parent, ignore_errors=True)
        raise


def start_writing(folder: Path) -> Path:
    """Make the empty folder to write into: under the same name, in a hidden one beside the place."""
    assert folder.name, f"{folder} has no name to write under"
    temporary = folder.parent / f"{_WRITING}{secrets.token_hex(8)}" / folder.name
    while True:
        # Between the two that are made, another process may take the first for one that was left.
        with suppress(FileNotFoundError):
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary.parent.mkdir(exist_ok=True)
            temporary.mkdir()
            return temporary


def commit(temporary: Path, folder: Path) -> None:
    """Flush a folder that :func:`start_writing` gave to disk, and move it to its place.

    Where the file system can exchange two folders, there is no moment without the old or the new one.
    """
    readable = temporary.stat().st_mode & 0o666  # as the umask of who writes leaves it
    for path in [*temporary.rglob("*"), temporary]:
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | readable)  # safetensors lets the owner alone read
        _flush(path)
    if not folder.exists():
        temporary.rename(folder)
    elif not _exchange(temporary, folder):
        folder.rename(temporary.with_name(f"{folder.name}.old"))
        temporary.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(temporary.parent, ignore_errors=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the writers of safetensors, torch and SQLite raise on a full disk into Python's own error.

    Args:
        path: what is written, for the message.

    Raises:
        OSError: instead; when the disk is full, with its name.
    """
    try:
        yield
    except OSError as error:
        name = str(error.filename or "")
        unnamed = not name or _WRITING in name or ".partial" in name
        if error.errno is None or not (unnamed or error.errno in _FULL):
            raise
        raise _disk_error(error.errno, path if unnamed else name) from error
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is not None:
            raise _disk_error(int(number[1]), path) from error
        if re.search(r"inline_container|PytorchStreamWriter", str(error)):
            full = shutil.disk_usage(path.parent).free < 1 << 20
            raise _disk_error(errno.ENOSPC if full else errno.EIO, path) from error
        if "database or disk is full" in str(error):
            raise _disk_error(errno.ENOSPC, path) from error
        raise


def disk_of(path: str | os.PathLike[str]) -> str:
    """Return the disk that a path is or would be on, in words, with the room that is left."""
    place = os.path.realpath(path)
    while not os.path.ismount(place) and place != os.path.dirname(place):
        place = os.path.dirname(place)
    free, total = (f"{getattr(shutil.disk_usage(place), part) / 1e9:.1f}" for part in ("free", "total"))
    return f"the disk at {place} has {free} of {total} GB left"


_FULL = (errno.ENOSPC, errno.EDQUOT)


def _disk_error(number: int, path: str | os.PathLike[str]) -> OSError:
    reason = os.strerror(number)
    return OSError(number, f"{reason} ({disk_of(path)})" if number in _FULL else reason, str(path))


def remove_unfinished(folder: Path, pattern: str) -> None:
    """Remove what killed writers left of the folders in ``folder`` whose names match a pattern.

    This process must be the only writer of these.
    """
    for path in folder.glob(f"{_WRITING}*"):
        if path.is_symlink() or not path.is_dir():  # made by no process of this project
            continue
        names = [entry.name for entry in path.iterdir()]
        if not names or fnmatch.filter(names, pattern):
            shutil.rmtree(path, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Remove the files that killed writers left in a folder, of which this process is the only writer."""
    for path in folder.glob(".*.partial*"):
        if _PARTIAL.fullmatch(path.name):
            path.unlink()


def require_absent(paths: Sequence[Path], *, overwrite: bool = False) -> None:
    """Check that nothing would be overwritten.

    Raises:
        ValueError: when one of ``paths`` exists and ``overwrite`` is false.
    """
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise ValueError(
            f"{', '.join(existing)} already there: give another place, or remove it (or overwrite it, where "
            "there is that option)"
        )


def write_together(
    folder: str | os.PathLike[str], contents: Mapping[str, bytes | str], *, overwrite: bool = False
) -> None:
    """Write files that belong together into a folder, beside what else is there.

    While they are written a hidden file stands beside them: of a process that was killed, what is there may
    be replaced.

    Args:
        folder: made when it is not there.
        contents: of each file, by its name.
        overwrite: replace those that are there.

    Raises:
        ValueError: as :func:`require_room`.
    """
    require_room(folder, list(contents), overwrite=overwrite)
    mark = _mark(folder, list(contents))
    write_file(mark, "The files beside this one are only in part written.\n")
    for name, content in contents.items():
        write_file(Path(folder) / name, content)
    mark.unlink()


def require_room(folder: str | os.PathLike[str], names: Sequence[str], *, overwrite: bool = False) -> None:
    """Check, before hours are spent, that :func:`write_together` will find its place free.

    Raises:
        ValueError: when one of the files is there, whole, and ``overwrite`` is false; when ``folder`` is a
            file or nothing can be written there.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"{folder} is a file; a folder is needed")
    unfinished = _mark(folder, names).is_file()
    require_absent([Path(folder) / name for name in names], overwrite=overwrite or unfinished)
    require_writable(Path(folder))


def _mark(folder: str | os.PathLike[str], names: Sequence[str]) -> Path:
    return Path(folder) / f".{Path(names[0]).stem}.unfinished"


def require_new_folder(folder: str | os.PathLike[str]) -> Path:
    """Check that a folder is not there yet, or is empty, and can be written; return its whole path.

    Raises:
        ValueError: when it is, when it cannot, and for the working folder itself, which cannot be renamed.
    """
    path = Path(folder).resolve()
    if path == Path.cwd():
        raise ValueError(f"{folder} is the working folder: name a folder in it, such as {path / 'out'}")
    if path.exists() and not (path.is_dir() and next(path.iterdir(), None) is None):
        raise ValueError(f"{folder} is there already; choose another folder")
    require_writable(path.parent)
    return path


def require_writable(folder: Path) -> None:
    """Check that files can be written into ``folder``, or that it can be made; leaves nothing behind.

    Raises:
        ValueError: when they cannot.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"nothing can be written to {folder} ({error.strerror}): make {existing} writable, or choose "
            "another place"
        ) from error


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
_PARTIAL = re.compile(r"\.[0-9a-f]{16}\.partial(\..*)?")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change places at once; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    return renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
