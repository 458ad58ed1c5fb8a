"""Text files that people wrote."""

from __future__ import annotations

from pathlib import Path


def read_text(path: Path) -> str:
    """Read UTF-8, with or without a byte order mark.

    Raises:
        ValueError: for another encoding, naming the line.
    """
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} line {line} is not UTF-8: store the file as UTF-8") from error
