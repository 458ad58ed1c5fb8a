"""Captions of files: in CSV, in JSONL, or in a text file beside each."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...files.texts import read_text

logger = logging.getLogger(__name__)

Caption = str | Mapping[str, float]
"""A text, or several and how often each is taken."""

_CAPTION_FILES = ("captions.csv", "captions.jsonl")


def draw_caption(caption: Caption, generator: torch.Generator) -> str:
    """Return the text, or draw one of several by their weights."""
    if isinstance(caption, str):
        return caption
    return list(caption)[draw_index(list(caption.values()), generator)]


def draw_index(weights: list[float], generator: torch.Generator) -> int:
    """Draw a number below that of the weights; one alone takes no random number."""
    if len(weights) == 1:
        return 0
    return int(torch.multinomial(torch.tensor(weights, dtype=torch.float64), 1, generator=generator))


def texts_of(captions: Iterable[Caption | None]) -> list[str]:
    """List every text of captions."""
    return [
        text
        for caption in captions
        if caption is not None
        for text in ([caption] if isinstance(caption, str) else caption)
    ]


def weighted_texts(texts: Any, weights: Any = None) -> dict[str, float]:
    """Return texts and how often each is taken, from a text, or a list and perhaps a list of weights.

    Raises:
        ValueError: for anything else.
    """
    texts = [texts] if isinstance(texts, str) else list(texts or ())
    weights = [1.0] * len(texts) if weights is None else weights if isinstance(weights, list) else [weights]
    if len(weights) != len(texts) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a caption is a text, or texts and as many weights, got {texts} and {weights}")
    if not all(isinstance(weight, (int, float)) and 0 < weight < math.inf for weight in weights):
        raise ValueError(f"weights of captions must be above 0, got {weights}")
    found: dict[str, float] = {}
    for text, weight in zip(texts, weights, strict=True):
        if text.strip():
            found[text.strip()] = found.get(text.strip(), 0.0) + weight
    return found


def as_caption(weighted: Mapping[str, float]) -> Caption | None:
    """Return the caption that weighted texts are; None where there is no text, as in rows without one."""
    return next(iter(weighted), None) if len(weighted) < 2 else weighted


def read_captions(
    folder: Path, captions: str | None = None, *, extensions: Collection[str] = ()
) -> list[tuple[Path, Caption]]:
    """Read which files are captioned, and how. Those that are missing stay in, to be named when skipped.

    Args:
        folder: that paths are relative to.
        captions: CSV with the columns path, caption and perhaps weight, or JSONL with these keys, where a
            caption may be a list; lines of one path are several captions. ``captions.csv`` or
            ``captions.jsonl`` in the folder by default; where there is neither, text files beside the files,
            each line a caption.
        extensions: of the files that are captioned, such as ``.png``. Those without a caption are said.

    Returns:
        Path and caption of each.

    Raises:
        ValueError: when there are no captions, a line is not as it should be or is there twice (its number is
            named), or none of the files exists.
    """
    found = [folder / name for name in _CAPTION_FILES if (folder / name).is_file()]
    path = Path(captions) if captions else next(iter(found), None)
    there = _files(folder, extensions)
    if path is None and any(file.with_suffix(".txt").is_file() for file in there):
        captioned = _read_beside(there)
    else:
        captioned = _read_list(folder, path or folder / _CAPTION_FILES[0])
    listed = {file for file, _ in captioned}
    if silent := [file for file in there if file not in listed]:
        logger.warning(
            "%d files in %s have no caption and are left out, first %s", len(silent), folder, silent[0]
        )
    return captioned


def _files(folder: Path, extensions: Collection[str]) -> list[Path]:
    if not extensions or not folder.is_dir():
        return []
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in extensions)


def _read_beside(files: list[Path]) -> list[tuple[Path, Caption]]:
    """Read the text files beside files; those that have none, or an empty one, are left out."""
    captions = {
        file: as_caption(weighted_texts(read_text(file.with_suffix(".txt")).splitlines()))
        for file in files
        if file.with_suffix(".txt").is_file()
    }
    return [(file, caption) for file, caption in captions.items() if caption is not None]


def _read_list(folder: Path, path: Path) -> list[tuple[Path, Caption]]:
    if not path.is_file():
        raise ValueError(
            f"no captions at {path}: a CSV with the columns path and caption, or JSONL, is needed, or a .txt "
            "beside each file"
        )
    rows = list(_read_jsonl(path) if path.suffix == ".jsonl" else _read_csv(path))
    if not rows:
        raise ValueError(f"{path} lists no files")
    lines: dict[str, int] = {}
    captions: dict[str, dict[str, float]] = {}
    for number, name, texts in rows:
        first, known = lines.setdefault(name, number), captions.setdefault(name, {})
        if twice := known.keys() & texts.keys():
            raise ValueError(
                f"{path}, line {number}: {name} has the caption {min(twice)[:80]!r} already, from line "
                f"{first} on: remove one of the two; weights say how often a caption is taken"
            )
        known.update(texts)
    _name_missing(path, folder, lines)
    return [(folder / name, as_caption(texts) or "") for name, texts in captions.items()]


def _name_missing(path: Path, folder: Path, lines: Mapping[str, int]) -> None:
    missing = [(n, folder / name) for name, n in lines.items() if not (folder / name).is_file()]
    if len(missing) == len(lines):
        raise ValueError(
            f"none of the {len(lines)} files in {path} exists, first {missing[0][1]}, line {missing[0][0]}; "
            f"paths are relative to {folder}"
        )
    for n, file in missing[:10]:
        logger.warning("%s, line %d: no such file %s", path, n, file)
    if missing:
        logger.warning("%d of %d files are missing and will be skipped", len(missing), len(lines))


Rows = Iterator[tuple[int, str, dict[str, float]]]


def _read_csv(path: Path) -> Rows:
    """``(line number, path, texts and weights)`` of each row."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
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


def _read_jsonl(path: Path) -> Rows:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
        yield _checked(path, number, row)


def _checked(path: Path, number: int, row: Any) -> tuple[int, str, dict[str, float]]:
    values = [row.get(key) for key in ("path", "caption", "weight")] if isinstance(row, dict) else [None] * 3
    name, texts, weights = values
    try:
        if isinstance(weights, str):  # of a CSV
            weights = float(weights or 1)
        weighted = weighted_texts(texts, weights) if isinstance(texts, (str, list)) else {}
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
    if not (isinstance(name, str) and name.strip() and weighted):
        raise ValueError(
            f"{path}, line {number}: path and caption must be texts that are not empty, got {row}"
        )
    return number, name.strip(), weighted
