"""Videos: reading frames from files and from folders of pictures, writing MP4."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from ..optional import how_to_install
from .frame_folder import FRAME_EXTENSIONS, VIDEO_EXTENSIONS, FrameFolder
from .pictures import WHITE
from .video_decord import DecordReader
from .video_packets import UnreadableVideoError
from .video_reader import Frames, IndexedReader
from .writing import disk_of, write_file

__all__ = [
    "FRAME_EXTENSIONS",
    "VIDEO_EXTENSIONS",
    "Decoder",
    "Frames",
    "UnreadableVideoError",
    "VideoReader",
    "open_video",
    "require_video_writer",
    "write_video",
]

Decoder = Literal["auto", "pyav", "decord", "torchcodec"]

logger = logging.getLogger(__name__)


class VideoReader(Protocol):
    """Video whose frames are read by their numbers, in the order in which they are shown.

    Attributes:
        num_frames: that are shown, as FFmpeg counts them when it decodes the whole file; those that it
            cannot decode may be among them, see :func:`open_video`.
        fps: frames per second, the mean where they vary.
        times: seconds ``[num_frames]`` from the first frame to each, None when the rate is constant.
    """

    num_frames: int
    fps: float
    times: NDArray[np.float64] | None

    def read(self, indices: Sequence[int]) -> Frames:
        """Return the frames at ``indices``, uint8 ``[n, H, W, 3]``, in RGB and upright.

        Raises:
            UnreadableVideoError: when one is not there or cannot be decoded.
        """
        ...


def open_video(
    path: str | os.PathLike[str], *, decoder: Decoder = "auto", background: str = WHITE
) -> VideoReader:
    """Open a video for reading.

    Frames are those that FFmpeg gives when it decodes the whole file, whatever the container: chosen by the
    time at which they are shown, without those that an edit list hides. This time counts in a damaged file,
    too: a frame that proves undecodable when it is read is an error and keeps its number, while FFmpeg leaves
    it out, so that those after it are one place further to the front.

    Args:
        path: of a file that FFmpeg reads (MP4, MOV, MKV, WebM, AVI, MPEG, TS, FLV, Ogg, WMV, GIF, APNG, ...),
            or of a folder of pictures, see :class:`~mhla_diffusion.files.frame_folder.FrameFolder`.
        decoder: of files. ``"pyav"`` reads all of them. ``"decord"`` those for which it is proven right, see
            :class:`~mhla_diffusion.files.video_decord.DecordReader`, with the same frames. ``"auto"`` is
            PyAV, which is faster: clips of H.264 took 0.4 to 0.8 times as long as with decord, whose proof
            comes before the first (docs/performance.md, "Reading clips").
            ``"torchcodec"``, which old configs name, is read with PyAV, too.
        background: colour behind transparent pixels, by its name in CSS or as #rrggbb. That VP8 and VP9 in
            WebM are transparent is not decoded.

    Raises:
        UnreadableVideoError: when the file is missing, empty, not a regular file, cut short, no video, or of
            an unknown codec, or when decord would give other frames; the message says which.
        ValueError: for another decoder.
        ImportError: without the package av, or decord where it is asked for.
    """
    if decoder not in get_args(Decoder):
        raise ValueError(f"decoder must be one of {', '.join(get_args(Decoder))}, got {decoder!r}")
    path = os.fspath(path)
    if os.path.isdir(path):
        return FrameFolder(path, background)
    if find_spec("av") is None:
        raise ImportError(f"reading videos needs PyAV: {how_to_install('av')}")
    if decoder == "torchcodec":
        _say_that_torchcodec_is_not_used()
    return DecordReader(path) if decoder == "decord" else IndexedReader(path, background)


@cache
def _say_that_torchcodec_is_not_used() -> None:
    logger.warning("The decoder torchcodec is no longer used; videos are read with PyAV.")


def write_video(frames: Frames, path: str | os.PathLike[str], *, fps: float) -> None:
    """Write an MP4 (H.264, 4:2:0, as every player and browser takes), under another name first.

    Args:
        frames: uint8 ``[F, H, W, 3]`` or ``[F, H, W]``. An odd height or width is enlarged by one.
        path: ends in .mp4; what is there is replaced.
        fps: frames per second.

    Raises:
        ValueError: for frames of another kind.
        OSError: when the file does not hold all frames after writing, on a full disk for example. What was
            at ``path`` is left as it was.
        ImportError: without the packages imageio and imageio-ffmpeg, which bring their own FFmpeg, and av.
    """
    if frames.dtype != np.uint8 or frames.ndim not in (3, 4) or (frames.ndim == 4 and frames.shape[-1] != 3):
        raise ValueError(
            f"frames must be uint8 [F, H, W, 3] or [F, H, W], got {frames.dtype} {list(frames.shape)}"
        )
    require_video_writer()
    from diffusers.utils import export_to_video
    from PIL import Image

    odd = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)][: frames.ndim]
    images = [Image.fromarray(frame).convert("RGB") for frame in np.pad(frames, odd, mode="edge")]

    def write(file: Path) -> None:
        try:
            export_to_video(images, str(file), fps=fps, quality=9.0, macro_block_size=2)
            written = open_video(file).num_frames
        except (OSError, UnreadableVideoError) as error:
            raise OSError(
                f"{path} could not be written: {_first_line(error, file)}; {disk_of(path)}"
            ) from error
        if written != len(images):
            raise OSError(f"{path} could not be written: it has {written} of {len(images)} frames")

    write_file(path, write)


def _first_line(error: Exception, file: Path) -> str:
    """What ended FFmpeg, without the name of a file that is gone, and the usual cause."""
    lines = str(error).replace(str(file), "what was written").strip().splitlines()
    return f"{lines[0] if lines else type(error).__name__}; is the disk full, or a limit of files reached?"


def require_video_writer() -> None:
    """Check, before hours are spent, that videos can be written.

    Raises:
        ImportError: without the packages imageio, imageio-ffmpeg and av, which reads them back.
    """
    for name in ("imageio", "imageio_ffmpeg", "av"):
        if find_spec(name) is None:
            # diffusers would fall back to OpenCV, whose MP4 files browsers do not play.
            raise ImportError(f"videos are written with imageio-ffmpeg: {how_to_install(name)}")
