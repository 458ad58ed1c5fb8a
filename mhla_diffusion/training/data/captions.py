"""Captions of files: in CSV, JSONL or JSON, or in a text file beside each."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...files.names import is_hidden
from ...files.text import read_text

logger = logging.getLogger(__name__)

Caption = str | Mapping[str, float]
"""A text, or several and how often each is taken."""

# The latter two are those of Hugging Face, as are the latter names of the columns.
_CAPTION_FILES = ("captions.csv", "captions.jsonl", "captions.json", "metadata.csv", "metadata.jsonl")
_PATHS, _CAPTIONS = ("path", "file_name"), ("caption", "text")
_LARGEST_FIELD = 1 << 24

Rows = Iterator[tuple[int, Any]]


_SIDES = re.compile(r"\b(left|right)(most|wards?|-hand)?\b", re.IGNORECASE)


def warn_of_sides(captions: Iterable[Caption | None]) -> None:
    """Warn of captions that name a side, which mirrored pictures contradict."""
    texts = texts_of(captions)
    if named := [text for text in texts if _SIDES.search(text)]:
        logger.warning(
            "data.flip mirrors pictures, but %d of %d captions seem to name a side, first %r: set it to "
            "false where they do",
            len(named), len(texts), named[0][:80],
        )  # fmt: skip


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
    several = isinstance(texts, Iterable) and not isinstance(texts, str)
    texts = [] if texts is None else list(texts) if several else [texts]
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
        folder: that paths are relative to, and lie in.
        captions: CSV with the columns path (or file_name), caption (or text) and perhaps weight, or JSONL or
            a JSON array of objects with these keys, where a caption may be a list; lines of one path are
            several captions. ``captions.csv``, ``.jsonl`` or ``.json``, or ``metadata.csv`` or ``.jsonl``, in
            the folder by default; where there is none, text files beside the files, each line a caption.
        extensions: of the files that are captioned, such as ``.png``. Those without a caption are said.

    Returns:
        Path and caption of each.

    Raises:
        ValueError: when there are no captions, a line is not as it should be or is there twice (its number is
            named), a path leads out of the folder, or none of the files exists.
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
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in extensions and not any(map(is_hidden, path.relative_to(folder).parts))
    )


def _read_beside(files: list[Path]) -> list[tuple[Path, Caption]]:
    """Read the text files beside files; those that have none, or an empty one, are left out."""
    captions = {
        file: as_caption(weighted_texts(read_text(file.with_suffix(".txt")).splitlines()))
        for file in files
        if file.with_suffix(".txt").is_file()
    }
    return [(file, caption) for file, caption in captions.items() if caption is not None]


def _read_list(folder: Path, path: Path) -> list[tuple[Path, Caption]]:
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} does not exist")
    if not path.is_file():
        raise ValueError(
            f"no captions at {path}: a CSV with the columns path and caption, or JSONL, is needed, or a .txt "
            "beside each file"
        )
    read = _read_csv if path.suffix.lower() not in (".json", ".jsonl") else _read_json
    place = os.path.join(os.path.abspath(folder), "")
    lines: dict[str, int] = {}
    captions: dict[str, dict[str, float]] = {}
    for number, row in read(path, read_text(path)):
        name, texts = _checked(path, number, row, place)
        first, known = lines.setdefault(name, number), captions.setdefault(name, {})
        if twice := known.keys() & texts.keys():
            raise ValueError(
                f"{path}, line {number}: {name} has the caption {min(twice)[:80]!r} already, from line "
                f"{first} on: remove one of the two; weights say how often a caption is taken"
            )
        known.update(texts)
    if not lines:
        raise ValueError(f"{path} lists no files")
    _name_missing(path, folder, lines)
    return [(folder / name, as_caption(texts) or "") for name, texts in captions.items()]


def _name_missing(path: Path, folder: Path, lines: Mapping[str, int]) -> None:
    missing = [
        (number, name) for name, number in lines.items() if not os.path.exists(os.path.join(folder, name))
    ]
    if len(missing) == len(lines):
        raise ValueError(
            f"none of the {len(lines)} files in {path} exists, first {folder / missing[0][1]}, line "
            f"{missing[0][0]}; paths are relative to {folder}"
        )
    for number, name in missing[:10]:
        logger.warning("%s, line %d: no such file %s", path, number, folder / name)
    if missing:
        logger.warning("%d of %d files are missing and will be skipped", len(missing), len(lines))


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


def _checked(path: Path, number: int, row: Any, place: str) -> tuple[str, dict[str, float]]:
    """Return file, texts and weights of a row, which may come from a stranger: the file lies in the folder.

    Args:
        place: the folder, as a whole path with a separator at its end, that the file is then relative to.
    """
    known = row if isinstance(row, dict) else {}
    name, texts = (next((known[key] for key in keys if key in known), "") for keys in (_PATHS, _CAPTIONS))
    weights = known.get("weight")
    try:
        if isinstance(weights, str):  # of a CSV
            weights = float(weights or 1)
        weighted = weighted_texts(texts, weights) if isinstance(texts, (str, list)) else {}
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
    if not (isinstance(name, str) and name.strip() and weighted):
        raise ValueError(
            f"{path}, line {number}: path and caption must be texts that are not empty, got {str(row)[:200]}"
        )
    if re.search("[\ud800-\udfff]", name + "".join(weighted)):
        raise ValueError(
            f"{path}, line {number}: holds halves of characters (surrogates): {str(row)[:200]!a}"
        )
    file = os.path.abspath(os.path.join(place, name.strip()))
    if "\0" in name or not file.startswith(place):
        raise ValueError(
            f"{path}, line {number}: {name!r} leads out of {place}: put the files there, or give a folder "
            "that holds them all"
        )
    return file[len(place) :], weighted
