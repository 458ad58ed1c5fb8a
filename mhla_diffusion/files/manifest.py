"""manifest.json: what generation writes of a folder, and scoring reads.

A dict of everything that the samples depend on, and under ``"images"`` or ``"videos"`` a row for each of
them: ``file``, ``seed``, and ``class_id`` and ``class_name`` or ``prompt``.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from .writing import write_file

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder, None when it has none.

    Raises:
        ValueError: when it is not a JSON object.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(content: bytes, source: str) -> dict[str, Any]:
    """Return the manifest that a file holds.

    Raises:
        ValueError: when it is not a JSON object; the message names ``source``.
    """
    try:
        # NaN is no JSON, and would be found out where a report is written, after all the work.
        manifest = json.loads(content.decode("utf-8-sig"), parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON ({error}): mend or remove it") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{source} is not a JSON object: mend or remove it")
    return manifest


def manifest_rows(manifest: dict[str, Any], key: str, source: str) -> list[dict[str, Any]]:
    """Return the rows of a manifest, each of which names a file.

    Args:
        key: ``"images"`` or ``"videos"``.

    Raises:
        ValueError: when these are no such rows; the message names ``source``.
    """
    rows = manifest[key]
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("file"), str) for row in rows
    ):
        raise ValueError(f"'{key}' in {source} must be a list of rows that each have 'file'")
    return rows


def manifest_requests(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarize what the rows of a manifest ask for.

    Returns:
        ``requests_sha256``, a hash of classes, prompts, sizes and pictures whatever their order, and where
        all rows have one, ``seeds``: the first and the last of each range.
    """
    asked = [{key: value for key, value in row.items() if key not in ("file", "seed")} for row in rows]
    lines = sorted(json.dumps(request, sort_keys=True, default=str) for request in asked)
    found: dict[str, Any] = {"requests_sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()}
    seeds = [row["seed"] for row in rows if type(row.get("seed")) is int]
    if rows and len(seeds) == len(rows):
        found["seeds"] = _ranges(sorted(set(seeds)))
    return found


def _ranges(numbers: list[int]) -> list[list[int]]:
    ranges = [[numbers[0], numbers[0]]]
    for number in numbers[1:]:
        if number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges


def require_inside(rows: list[dict[str, Any]], folder: Path) -> None:
    """Check that the files of a manifest lie in its folder, whether they are there or not.

    Raises:
        ValueError: when one does not: a manifest may come from a stranger, and the pictures that it names are
            shown in a report.
    """
    place = folder.resolve()
    inside = lru_cache(maxsize=1024)(lambda where: where.resolve().is_relative_to(place))
    for row in rows:
        file = folder / row["file"]
        if ".." in Path(row["file"]).parts or not inside(file if file.is_symlink() else file.parent):
            raise ValueError(
                f"{folder / MANIFEST} lists {row['file']!r}, which leads out of its folder: put the file "
                "there itself"
            )


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a folder."""
    write_file(folder / MANIFEST, json.dumps(manifest, indent=1, default=str))
