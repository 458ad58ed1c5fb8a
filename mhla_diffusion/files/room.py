"""Checks, before hours are spent, that results will find their place."""

from __future__ import annotations

import tempfile
from pathlib import Path


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
