"""Files of weights in the folder of a model: of one form, as diffusers takes the first that it finds."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_INDEX_NAME
from diffusers.utils.hub_utils import _add_variant


def require_first(folder: Path, variant: str | None, *, safe_serialization: bool) -> None:
    """Check that what is saved into a folder is what will be loaded from it.

    Raises:
        ValueError: when it is a file, or holds safetensors and the weights shall be pickled.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file: choose a folder to save into")
    if safe_serialization:
        return
    for name in (SAFETENSORS_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        earlier = folder / _add_variant(name, variant)
        if earlier.exists():
            raise ValueError(
                f"{earlier} would be loaded in place of weights with safe_serialization=False: save with it, "
                "into another folder, or remove that first"
            )


def remove_dead_index(folder: Path, variant: str | None, *, safe_serialization: bool) -> None:
    """Remove the index of an earlier save in parts, which diffusers has removed: it would be read first."""
    name = SAFE_WEIGHTS_INDEX_NAME if safe_serialization else WEIGHTS_INDEX_NAME
    index = folder / _add_variant(name, variant)
    if not index.is_file():
        return
    parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if not any((folder / part).exists() for part in parts):
        index.unlink()
