"""Height and width of every file of a data set, opened once and kept beside the captions."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ...files.writing import write_file

logger = logging.getLogger(__name__)

Shape = tuple[int, int] | None
"""Height and width; None for a file that cannot be read, which is named when its turn comes."""

_VERSION = 1
_KEPT_EVERY = 5_000


def read_shapes(
    files: Sequence[Path], measure: Callable[[int], Shape], index: Path | None = None
) -> list[Shape]:
    """Return the shape of each file; one that is in the index, of the same size and time, is not opened.

    Args:
        files: of the data set.
        measure: opens a file, by its place in ``files``; called in other processes.
        index: JSON that is read, and written anew when files were opened; None to keep nothing.
    """
    known = {} if index is None else _read_index(index)
    names = [str(file) if index is None else os.path.relpath(file, index.parent) for file in files]
    stamps = [_stamp(file) for file in files]
    found = [known.get(name, []) for name in names]
    unknown = [n for n, stamp in enumerate(stamps) if stamp is not None and found[n][:2] != stamp]
    kept = index
    for start in range(0, len(unknown), _KEPT_EVERY):
        numbers = unknown[start : start + _KEPT_EVERY]
        for n, shape in zip(numbers, measured(measure, numbers), strict=True):
            found[n] = [*(stamps[n] or ()), *(shape or (None, None))]
        if kept is not None:
            entries = {name: entry for name, entry in zip(names, found, strict=True) if entry}
            kept = _write_index(kept, known | entries)
    return [
        (entry[2], entry[3]) if stamp is not None and entry[2] is not None else None
        for stamp, entry in zip(stamps, found, strict=True)
    ]


class _Numbered:
    """Files by their place in the order in which they are opened."""

    def __init__(self, measure: Callable[[int], Shape], numbers: Sequence[int]) -> None:
        self.measure, self.numbers = measure, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Shape:
        return self.measure(self.numbers[place])


def measured(measure: Callable[[int], Shape], numbers: Sequence[int]) -> Any:
    """Return the shape of each of these samples, opened in other processes."""
    # Workers in any case: a reader in this process would make later ones hang.
    workers = min(8, os.cpu_count() or 1, len(numbers))
    files: Any = _Numbered(measure, numbers)
    # One iterator, as tqdm would start the workers twice.
    shapes = iter(DataLoader(files, batch_size=None, num_workers=workers))
    return tqdm(shapes, desc="shapes", unit="file", total=len(numbers))


def _stamp(file: Path) -> list[int] | None:
    """Return what changes when a file is replaced; None when it is not there."""
    try:
        status = file.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _read_index(index: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        if content["version"] == _VERSION:
            return dict(content["shapes"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is made anew, as it cannot be read (%s)", index, error)
    return {}


def _write_index(index: Path, shapes: dict[str, list[Any]]) -> Path | None:
    """Write the index; returns where, None when nothing can be written there."""
    try:
        write_file(index, json.dumps({"version": _VERSION, "shapes": shapes}, separators=(",", ":")))
    except OSError as error:
        logger.warning("%s cannot be kept (%s): the next start opens every file again", index, error)
        return None
    return index
