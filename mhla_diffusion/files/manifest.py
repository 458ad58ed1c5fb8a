"""manifest.json: what generation writes of a folder, and scoring reads.

A dict of everything that the samples depend on, and under ``"images"`` or ``"videos"`` a row for each of
them: ``file``, ``seed``, and ``class_id`` and ``class_name`` or ``prompt``.
"""

from __future__ import annotations

import json
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
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): mend or remove it") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} is not a JSON object: mend or remove it")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a folder."""
    write_file(folder / MANIFEST, json.dumps(manifest, indent=1, default=str))
