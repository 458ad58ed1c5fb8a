"""Folders of pictures as videos: one picture a frame, as StyleGAN-V and many data sets store them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .names import is_hidden
from .pictures import DECODING_ERRORS, WHITE, read_picture
from .video_packets import UnreadableVideoError, file_stamp
from .video_reader import Frames, require_frames

# Names of files that FFmpeg reads as videos.
VIDEO_EXTENSIONS = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".wmv", ".asf", ".flv", ".f4v"),
    *(".mpg", ".mpeg", ".m2v", ".vob", ".ts", ".m2ts", ".mts", ".mxf", ".ogv", ".gif", ".apng"),
)
FRAME_EXTENSIONS = (".bmp", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class FrameFolder:
    """Folder of pictures of one size as a video.

    Pictures are taken in the order of the numbers in their names (frame_2.png before frame_10.png); files of
    other kinds and folders in it are passed over.

    Args:
        path: of the folder.
        background: colour behind transparent pixels.

    Attributes:
        num_frames: pictures in it.
        fps: 25, as FFmpeg takes for pictures, which do not say it.
        times: None, as the rate is constant.

    Raises:
        UnreadableVideoError: when there are no pictures in it.
    """

    fps = 25.0
    times: NDArray[np.float64] | None = None

    def __init__(self, path: str, background: str = WHITE) -> None:
        names = sorted(filter(_is_picture, os.listdir(path)), key=_by_number)
        if not names:
            raise UnreadableVideoError(f"{path}: a folder without pictures ({', '.join(FRAME_EXTENSIONS)})")
        self._paths = [os.path.join(path, name) for name in names]
        self._path, self._background, self.num_frames = path, background, len(names)

    def read(self, indices: Sequence[int]) -> Frames:
        """Return the pictures at ``indices``, uint8 ``[n, H, W, 3]``.

        Raises:
            UnreadableVideoError: when one is not there, cannot be read as RGB of 8 bits, or has not the
                size of the others.
        """
        require_frames(self._path, self.num_frames, indices)
        frames = {index: _read_frame(self._paths[index], self._background) for index in sorted(set(indices))}
        shapes = {frame.shape: self._paths[index] for index, frame in frames.items()}
        if len(shapes) > 1:
            sizes = ", ".join(f"{path} {shape[0]} x {shape[1]}" for shape, path in shapes.items())
            raise UnreadableVideoError(f"{self._path}: the pictures of a video are of one size, got {sizes}")
        return np.stack([frames[index] for index in indices])


def _is_picture(name: str) -> bool:
    # Hidden ones are left by writers that were killed, and by macOS.
    return name.lower().endswith(FRAME_EXTENSIONS) and not is_hidden(name)


def _by_number(name: str) -> list[tuple[int, str]]:
    """A key by which numbers in names are compared as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read_frame(path: str, background: str) -> Frames:
    file_stamp(path)
    try:
        return np.asarray(read_picture(path, background).convert("RGB"))
    except DECODING_ERRORS as error:
        raise UnreadableVideoError(f"{path} cannot be read ({error})") from error
