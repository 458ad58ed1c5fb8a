"""Text: files that people made, in the encodings that they have, and what messages and tables say."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def read_text(path: str | os.PathLike[str]) -> str:
    """Read UTF-8, or what begins with a mark that says which other Unicode it is.

    Raises:
        ValueError: when it is another encoding, with the line that shows it.
    """
    content = Path(path).read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} line {line} is not UTF-8: store the file as UTF-8") from error


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return rows of cells, the first of them the head, as a table in Markdown."""
    head, *rows = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, f"|{' --- |' * len(lines[0])}", *rows])


def shortened(value: Any) -> str:
    """Return a value as messages say it: of a hash its first 12 digits."""
    text = str(value)
    return text[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{16,}", value) else text


def flat_dict(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to one, its keys dotted."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flat_dict(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changes(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    free: Collection[str] = (),
    show: Callable[[Any], str] = shortened,
) -> list[str]:
    """List where settings differ, as ``key: old -> new`` with dotted keys.

    Args:
        before, after: nested mappings.
        free: dotted keys that may differ.
        show: writes a value.
    """
    old, new = flat_dict(before), flat_dict(after)
    told = [{key: show(value) for key, value in its.items()} for its in (old, new)]
    return [
        f"{key}: {told[0].get(key, '(absent)')} -> {told[1].get(key, '(absent)')}"
        for key in [*new, *(key for key in old if key not in new)]
        if key not in free and old.get(key) != new.get(key)
    ]


def sizes_text(sizes: Iterable[int]) -> str:
    """Return sizes along axes as ``2 x 3 x 4``."""
    return " x ".join(map(str, sizes))
