"""Captions beside the files that they describe, in CSV or JSONL."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_CAPTION_FILES = ("captions.csv", "captions.jsonl")


def read_captions(folder: Path, captions: str | None = None) -> list[tuple[Path, str]]:
    """Read which files a list of captions names. Those that are missing stay in, to be named when skipped.

    Args:
        folder: that paths are relative to.
        captions: CSV with the columns path and caption, or JSONL with these keys; ``captions.csv`` or
            ``captions.jsonl`` in the folder by default.

    Returns:
        Path and caption of each.

    Raises:
        ValueError: when there is no such list, a line is not as it should be (its number is named), or none
            of the files exists.
    """
    found = [folder / name for name in _CAPTION_FILES if (folder / name).is_file()]
    path = Path(captions) if captions else next(iter(found), folder / _CAPTION_FILES[0])
    if not path.is_file():
        raise ValueError(
            f"no captions at {path}: a CSV with the columns path and caption, or JSONL, is needed"
        )
    rows = list(_read_jsonl(path) if path.suffix == ".jsonl" else _read_csv(path))
    if not rows:
        raise ValueError(f"{path} lists no files")
    missing = [(n, folder / name) for n, name, _ in rows if not (folder / name).is_file()]
    if len(missing) == len(rows):
        raise ValueError(
            f"none of the {len(rows)} files in {path} exists, first {missing[0][1]}, line {missing[0][0]}; "
            f"paths are relative to {folder}"
        )
    for n, file in missing[:10]:
        logger.warning("%s, line %d: no such file %s", path, n, file)
    if missing:
        logger.warning("%d of %d files are missing and will be skipped", len(missing), len(rows))
    return [(folder / name, caption) for _, name, caption in rows]


def _read_csv(path: Path) -> Iterator[tuple[int, str, str]]:
    """``(line number, path, caption)`` of each row."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, strict=True)
        if not {"path", "caption"} <= set(reader.fieldnames or ()):
            raise ValueError(
                f"{path}, line 1: the columns path and caption are needed, got {reader.fieldnames or 'none'}"
            )
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {len(reader.fieldnames or ())} columns are needed; "
                        "a caption with a comma stands in double quotes"
                    )
                yield _checked(path, reader.line_num, row)
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, str, str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
            yield _checked(path, number, row)


def _checked(path: Path, number: int, row: Any) -> tuple[int, str, str]:
    values = [row.get(key) for key in ("path", "caption")] if isinstance(row, dict) else []
    if not values or not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(
            f"{path}, line {number}: path and caption must be texts that are not empty, got {row}"
        )
    name, caption = map(str, values)
    return number, name.strip(), caption.strip()
