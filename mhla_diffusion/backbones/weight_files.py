"""Files of weights in the folder of a model: of one form, as diffusers takes the first that it finds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def without_index(folder: Path, variant: str | None, *, safe_serialization: bool) -> Iterator[None]:
    """Remove the index of an earlier save in parts while another is made: diffusers removes the parts alone.

    It would be read before the file of a whole. Where nothing is saved, by an error, it is put back.
    """
    name = SAFE_WEIGHTS_INDEX_NAME if safe_serialization else WEIGHTS_INDEX_NAME
    index = folder / _add_variant(name, variant)
    if not index.is_file():
        yield
        return
    earlier = index.read_bytes()
    index.unlink()
    try:
        yield
    except BaseException:
        if not index.exists():
            index.write_bytes(earlier)
        raise
