"""manifest.json: what generation writes of a folder, and scoring reads.

A dict of everything that the samples depend on, and under ``"images"`` or ``"videos"`` a row for each of
them: ``file``, ``seed``, and ``class_id`` and ``class_name`` or ``prompt``.
"""

from __future__ import annotations

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
    try:
        # NaN is no JSON, and would be found out where a report is written, after all the work.
        manifest = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): mend or remove it") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} is not a JSON object: mend or remove it")
    return manifest


def listed_files(manifest: dict[str, Any], key: str, folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a manifest, whose files lie in ``folder``, there or not.

    Args:
        key: ``"images"`` or ``"videos"``.

    Raises:
        ValueError: when these are no rows with files, or one leads out of the folder: a manifest may come
            from a stranger, and what it names ends up in a report.
    """
    rows, path = manifest[key], folder / MANIFEST
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("file"), str) for row in rows
    ):
        raise ValueError(f"'{key}' in {path} must be a list of rows that each have 'file'")
    place = folder.resolve()
    inside = lru_cache(maxsize=1024)(lambda where: where.resolve().is_relative_to(place))
    for row in rows:
        file = folder / row["file"]
        if ".." in Path(row["file"]).parts or not inside(file if file.is_symlink() else file.parent):
            raise ValueError(
                f"{path} lists {row['file']!r}, which leads out of its folder: put the file there itself"
            )
    return rows


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a folder."""
    write_file(folder / MANIFEST, json.dumps(manifest, indent=1, default=str))
