"""Files that others wrote: what they are by their content, and arrays that are checked before use."""

from __future__ import annotations

import stat
import tokenize
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

_BEGINNINGS = {b"\x93NUMPY": "npy", b"PAR1": "parquet", b"\x1f\x8b": "gzip", b"\x80": "pickle"}
_LARGEST_HEADER = 1 << 20


def require_regular(path: Path) -> Path:
    """Return ``path`` when it is a regular file: a pipe would be waited for, and a device has no end.

    Raises:
        ValueError: when it is something else.
        OSError: when there is nothing, or it must not be looked at.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is no regular file but a folder, pipe or device: it is not opened")
    return path


def file_kind(path: str | Path) -> str | None:
    """Tell what a file is by its content, whatever it is called.

    Returns:
        ``npz``, ``npy``, ``zip``, ``tar``, ``parquet``, ``gzip``, ``torch`` (what torch.save wrote),
        ``pickle``, ``html`` or ``unknown``; None when there is no regular file.
    """
    path = Path(path)
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        start = file.read(512)
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _zip_kind(path)
    if start[257:262] == b"ustar":
        return "tar"
    if start.lstrip(b"\xef\xbb\xbf \r\n\t")[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "html"
    return next((kind for magic, kind in _BEGINNINGS.items() if start.startswith(magic)), "unknown")


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} is not a whole npz or zip file ({error}): write or copy it again"
        ) from error
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    return "torch" if any(name.endswith("/data.pkl") for name in names) else "zip"


def describe_kind(kind: str | None) -> str:
    """Say in words what a file is that was taken for another."""
    return {
        None: "there is no such file",
        "html": "it is a web page: the download was answered with one, fetch the file again",
        "gzip": "it is compressed with gzip: unpack it first",
        "pickle": "it is a pickle, which is not opened as it can run code",
        "unknown": "by its content it is no format that is known here, or a damaged file",
    }.get(kind, f"by its content it is {kind}")


def read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type of an array; leaves the stream at its first element.

    Raises:
        ValueError: when it is none, or is of Python objects or in Fortran order.
    """
    form = np.lib.format
    try:
        read = form.read_array_header_1_0 if form.read_magic(stream) == (1, 0) else form.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (SyntaxError, tokenize.TokenError, TypeError, OverflowError) as error:
        raise ValueError(f"its header is damaged ({error})") from error
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are pickled and can run code: save plain numbers")
    if fortran and len(shape) > 2:
        raise ValueError("it is stored in Fortran order: write it with numpy.ascontiguousarray")
    return shape, dtype


def npz_headers(
    path: Path, *, largest: int | None = None
) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Read shape and type of every array in an npz, and its whole content once, to see that it is undamaged.

    Args:
        largest: bytes that one array may have, where they will be held in memory.

    Raises:
        ValueError: when the file is no npz, is damaged, or a header says other than what follows it.
    """
    if (kind := file_kind(path)) != "npz":
        raise ValueError(f"{path} is not an npz file: {describe_kind(kind)}")
    try:
        with zipfile.ZipFile(path) as archive:
            found = {
                info.filename.removesuffix(".npy"): _checked_header(archive, info, largest)
                for info in archive.infolist()
            }
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole npz file ({error}): write or copy it again") from error
    return found


def _checked_header(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, largest: int | None
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    with archive.open(info) as stream:
        shape, dtype = read_npy_header(stream)
    size = prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or not 0 < info.file_size - size < _LARGEST_HEADER:
        raise ValueError(
            f"the header of {info.filename} says {dtype} {list(shape)}, and something else follows"
        )
    if largest is not None and size > largest:
        raise ValueError(f"{info.filename} has {size:,} bytes; at most {largest:,} are read")
    return shape, dtype
