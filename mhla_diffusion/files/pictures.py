"""Picture files: which are opened, and how their values become 8 bits without loss."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, PngImagePlugin

from .arrays import require_regular

# Other decoders run programs (EPS), or wait for a library that registers one.
_NOT_PICTURES = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "IPTC", "PCD"}
Image.init()
FORMATS = tuple(name for name in Image.OPEN if name not in _NOT_PICTURES)
EXTENSIONS = tuple(sorted(end for end, name in Image.registered_extensions().items() if name in FORMATS))
# Prompts and workflows of generators, and colour profiles, are often larger than Pillow's 1 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, 64 << 20)


def open_picture(path: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Open a picture, whatever it is called, with decoders that run no program; it is decoded later.

    Raises:
        ValueError: for a pipe or a device.
        OSError: when there is no such file, or it is no picture.
    """
    if isinstance(path, str | os.PathLike):
        path = require_regular(Path(path))
    return Image.open(path, formats=FORMATS)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Decode a picture; what is returned can be converted to ``L`` or ``RGB`` without losing its values.

    Integers of 16 bits are divided by 256, where Pillow would clip them at 255.

    Raises:
        ValueError: when its values would be lost: floating-point pixels, which have no defined range, or
            integers of 16 bits and more that do not use these.
    """
    if image.mode.startswith("I"):
        return Image.fromarray(_from_16_bits(np.asarray(image).astype(np.int64)))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    deep = ";16" in str([tile[3] for tile in getattr(image, "tile", [])])
    image.load()
    if deep and np.asarray(image.convert("RGB")).max() < 16:  # Pillow takes the high 8 bits
        raise ValueError("16 bits a colour of which only the low ones are used: save it with 8 bits")
    return image


def _from_16_bits(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    if low < 0 or high > 0xFFFF:
        raise ValueError(f"pixels from {low} to {high}; 0 to 65535 are expected")
    if 0 < high < 0x1000:
        raise ValueError(
            f"integer pixels from {low} to {high} would become nearly black, as 65535 is white: save them "
            "with 8 bits, or stretched to 16"
        )
    return (values >> 8).astype(np.uint8)
