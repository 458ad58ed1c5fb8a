"""Writing files so that none is ever half-written, and none overwritten unasked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path


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


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to a temporary file beside ``path``, then rename it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        # mkstemp makes private files; a report is as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def require_folder(path: str | Path) -> Path:
    """The folder ``path``, made when it is not there.

    Raises:
        ValueError: when ``path`` is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; a folder is needed")
    path.mkdir(parents=True, exist_ok=True)
    return path
