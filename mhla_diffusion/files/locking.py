"""Locks of folders, which end with the process that holds them, however it ends."""

from __future__ import annotations

import errno
import glob
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .writing import remove_partial, remove_unfinished, require_new_folder, require_writable

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


@contextmanager
def only_writer(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Be the only one that writes into a folder, inside the with block.

    The folder is made when it is not there, and removed again when nothing was written. What writers that
    were killed left of it is removed.

    Raises:
        ValueError: when another process writes there, or ``folder`` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a folder is needed")
    made = not folder.exists()
    descriptor = _lock(folder)
    try:
        place = folder.resolve()
        remove_unfinished(place.parent, glob.escape(place.name))
        remove_partial(place)
        yield
    finally:
        if descriptor in _held:  # a fork that comes here has let go already
            if made:
                with suppress(OSError):  # it is not empty
                    folder.rmdir()
            _held.discard(descriptor)
            os.close(descriptor)


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Be the only one that makes a folder, inside the with block, which is given its whole path.

    Raises:
        ValueError: as :func:`.writing.require_new_folder`, and when another process makes it.
    """
    path = Path(folder).resolve()
    require_writable(path.parent)
    with only_writer(path):
        yield require_new_folder(path)


_held: set[int] = set()


def _lock(folder: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            _flock(descriptor, folder)
            # Between the two lines above the folder may have been removed, or another put in its place.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), folder.stat()):
                    _held.add(descriptor)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"another process is writing to {folder}: wait for its end, or choose another folder"
        ) from error
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        logger.warning("%s cannot be locked (%s): start no other run there", folder, error.strerror)


def _let_go() -> None:
    # A lock lasts as long as any process has its descriptor: workers that outlive a kill must not.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
