"""Captions beside the files that they describe, in CSV, JSONL or JSON."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...files.text import read_text

logger = logging.getLogger(__name__)

# The latter two are those of Hugging Face, as are the latter names of the columns.
_CAPTION_FILES = ("captions.csv", "captions.jsonl", "captions.json", "metadata.csv", "metadata.jsonl")
_PATHS, _CAPTIONS = ("path", "file_name"), ("caption", "text")
_LARGEST_FIELD = 1 << 24

Rows = Iterator[tuple[int, Any]]


def read_captions(folder: Path, captions: str | None = None) -> list[tuple[Path, str]]:
    """Read which files a list of captions names. Those that are missing stay in, to be named when skipped.

    Args:
        folder: that paths are relative to, and lie in.
        captions: CSV with the columns path (or file_name) and caption (or text), or JSONL or a JSON array of
            objects with these keys, in UTF-8; ``captions.csv``, ``.jsonl`` or ``.json``, or ``metadata.csv``
            or ``.jsonl``, in the folder by default.

    Returns:
        Path and caption of each.

    Raises:
        ValueError: when there is no such list, a line is not as it should be (its number is named), a path
            leads out of the folder, or none of the files exists.
    """
    found = [folder / name for name in _CAPTION_FILES if (folder / name).is_file()]
    path = Path(captions) if captions else next(iter(found), folder / _CAPTION_FILES[0])
    if not path.is_file():
        raise ValueError(
            f"no captions at {path}: a CSV with the columns path and caption, or JSONL, is needed"
        )
    text = read_text(path)
    read = _read_csv if path.suffix.lower() not in (".json", ".jsonl") else _read_json
    place = os.path.abspath(folder)
    rows = [(number, *_checked(path, number, row, folder, place)) for number, row in read(path, text)]
    if not rows:
        raise ValueError(f"{path} lists no files")
    missing = [(number, file) for number, file, _ in rows if not os.path.exists(file)]
    if len(missing) == len(rows):
        raise ValueError(
            f"none of the {len(rows)} files in {path} exists, first {missing[0][1]}, line {missing[0][0]}; "
            f"paths are relative to {folder}"
        )
    for n, file in missing[:10]:
        logger.warning("%s, line %d: no such file %s", path, n, file)
    if missing:
        logger.warning("%d of %d files are missing and will be skipped", len(missing), len(rows))
    return [(file, caption) for _, file, caption in rows]


def _read_csv(path: Path, text: str) -> Rows:
    """Line number and values of each row."""
    csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_FIELD))
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = reader.fieldnames or ()
        if not all(any(name in names for name in known) for known in (_PATHS, _CAPTIONS)):
            raise ValueError(
                f"{path}, line 1: the columns path and caption are needed, got {names or 'none'}"
            )
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(names)} columns are needed; a caption with a "
                    "comma stands in double quotes"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _read_json(path: Path, text: str) -> Rows:
    """Line number and object of each line; of an array the number in it."""
    if text.lstrip().startswith("["):
        yield from enumerate(_parsed(text, str(path)), start=1)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parsed(line, f"{path}, line {number}")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from error


def _checked(path: Path, number: int, row: Any, folder: Path, place: str) -> tuple[Path, str]:
    """Return file and caption of a row, which may come from a stranger: the file lies in the folder.

    Args:
        place: the folder, as a whole path.
    """
    known = row if isinstance(row, dict) else {}
    name, caption = (next((known[key] for key in keys if key in known), "") for keys in (_PATHS, _CAPTIONS))
    if not all(isinstance(value, str) and value.strip() for value in (name, caption)):
        raise ValueError(
            f"{path}, line {number}: path and caption must be texts that are not empty, got {str(row)[:200]}"
        )
    if re.search("[\ud800-\udfff]", name + caption):
        raise ValueError(
            f"{path}, line {number}: holds halves of characters (surrogates): {str(row)[:200]!a}"
        )
    file = os.path.abspath(os.path.join(place, name.strip()))
    if "\0" in name or not file.startswith(place.rstrip(os.sep) + os.sep):
        raise ValueError(
            f"{path}, line {number}: {name!r} leads out of {place}: put the files there, or give a folder "
            "that holds them all"
        )
    return folder / name.strip(), caption.strip()
