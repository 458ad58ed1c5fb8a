"""Pictures in files as pixels, in one way for training and for scoring.

A picture is what a viewer shows: upright, its first frame, and on a background where it is transparent.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps, PngImagePlugin

from .arrays import require_regular

logger = logging.getLogger(__name__)

# Other decoders run programs (EPS), or wait for a library that registers one.
_NOT_PICTURES = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "IPTC", "PCD"}
Image.init()
FORMATS = tuple(name for name in Image.OPEN if name not in _NOT_PICTURES)
EXTENSIONS = tuple(sorted(end for end, name in Image.registered_extensions().items() if name in FORMATS))
# Prompts and workflows of generators, and colour profiles, are often larger than Pillow's 1 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, 64 << 20)

DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError),
    # What Pillow's plugins stumble over in a broken file.
    *(ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError, struct.error, zlib.error),
)
"""What is raised for a file that is cut short, broken, no picture, or absurdly large."""

PICTURE_CONVERSION = (
    "RGB, 8 bits; grayscale repeated, palette looked up, transparent pixels on {background}, 16-bit "
    "grayscale divided by 256, first frame of an animation, EXIF orientation applied"
)
"""What :func:`flat_picture` does, in words."""

VIDEO_CONVERSION = (
    "RGB, 8 bits, as the decoder gives it, upright, with square pixels, transparent ones on {background}; "
    "grayscale repeated"
)
"""What :func:`~mhla_diffusion.files.videos.open_video` does, in words."""

WHITE = "white"


def background_color(background: str) -> tuple[int, int, int]:
    """Return a colour by its name in CSS, ``"#rrggbb"`` or ``"rgb(r, g, b)"``, in 0 to 255.

    Raises:
        ValueError: for another, or one that is transparent itself.
    """
    try:
        color = ImageColor.getrgb(background)
    except ValueError:
        color = (0, 0, 0, 0)
    if len(color) != 3:
        raise ValueError(f"background must be a colour such as white, black or #808080, got {background!r}")
    return color


def open_picture(source: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Open a picture, as a context manager; nothing is decoded yet.

    Raises:
        ValueError: for a pipe or a device.
        OSError: when it is not there, or none of the formats of pictures.
    """
    if isinstance(source, str | os.PathLike):
        source = require_regular(Path(source))
    return Image.open(source, formats=FORMATS)


def flat_picture(image: Image.Image, background: str = WHITE) -> Image.Image:
    """Return what a picture shows, in 8 bits: of mode L, or RGB.

    Args:
        image: as :func:`open_picture` or ``Image.fromarray`` gives it.
        background: what is seen where it is transparent.

    Raises:
        ValueError: when its values would be lost: floating-point pixels, which have no defined range, or
            integers of 16 bits and more that do not use these.
    """
    deep = ";16" in str([tile[3] for tile in getattr(image, "tile", ())])
    image = _upright(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range: save it with 8 bits")
    if image.mode.startswith("I"):  # Pillow would clip 16-bit values at 255
        values = np.asarray(image).astype(np.int64)
        flat = _from_16_bits(values)
        if (clear := image.info.get("transparency")) is None:
            return flat
        shown = np.repeat(np.asarray(flat)[..., None], 3, -1)
        shown[values == clear] = background_color(background)
        return Image.fromarray(shown)
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*background_color(background), 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    flat = image.convert("L" if image.mode in ("1", "L") else "RGB")
    if deep and np.asarray(flat).max() < 16:  # Pillow takes the high 8 bits
        raise ValueError("16 bits a colour of which only the low ones are used: save it with 8 bits")
    return flat


def read_picture(source: str | os.PathLike[str] | IO[bytes], background: str = WHITE) -> Image.Image:
    """Read a picture; see :func:`flat_picture`.

    Raises:
        OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError: see ``DECODING_ERRORS``.
    """
    with open_picture(source) as image:
        return flat_picture(image, background)


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # what is wrong with the pixels is raised here
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises whatever it stumbles over
        # Viewers do not turn a picture whose tags are damaged.
        logger.debug("EXIF tags that cannot be read (%s)", error)
        return image


def _from_16_bits(values: NDArray[np.int64]) -> Image.Image:
    low, high = values.min(), values.max()
    if low < 0 or high > 0xFFFF:
        raise ValueError(f"pixels from {low} to {high}; 0 to 65535 are expected")
    if 0 < high < 0x1000:
        raise ValueError(
            f"integer pixels from {low} to {high} would become nearly black, as 65535 is white: save them "
            "with 8 bits, or stretched to 16"
        )
    return Image.fromarray((values >> 8).astype(np.uint8))
