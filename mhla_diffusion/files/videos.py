"""Video files: reading frames with decord or torchcodec, writing MP4."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .writing import write_file

Frames = NDArray[np.uint8]
Decoder = Literal["auto", "decord", "torchcodec"]


class UnreadableVideoError(ValueError):
    """A file that is no video that can be read; the message says why."""


class VideoReader(Protocol):
    """An open video. It must not cross a fork: open it in the process that reads."""

    num_frames: int
    fps: float

    def read(self, indices: Sequence[int]) -> Frames:
        """The frames at ``indices``, uint8 ``[n, H, W, 3]``."""
        ...


class _DecordReader:
    def __init__(self, path: str) -> None:
        import decord

        try:
            # One thread, as files are read by several workers.
            self._reader = decord.VideoReader(path, num_threads=1)
        except (decord.DECORDError, RuntimeError) as error:
            raise UnreadableVideoError(f"{path} {_why(error)}") from error
        self._path, self.num_frames = path, len(self._reader)
        self.fps = float(self._reader.get_avg_fps())

    def read(self, indices: Sequence[int]) -> Frames:
        import decord

        try:
            return self._reader.get_batch(list(indices)).asnumpy()
        except (decord.DECORDError, RuntimeError, IndexError) as error:
            if "size must exactly match" in str(error):
                return np.stack([_without_padding(self._reader[index].asnumpy()) for index in indices])
            raise UnreadableVideoError(f"{self._path} {_why(error)}") from error


def _without_padding(frame: Frames) -> Frames:
    """Frames of some small widths (16 and 48 among them) come from decord with padded rows.

    They are then declared ``[H, W, 4]`` or more, and reading them in batches fails.
    """
    height, width, channels = frame.shape
    return frame if channels == 3 else frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


class _TorchcodecReader:
    def __init__(self, path: str) -> None:
        from torchcodec.decoders import VideoDecoder

        try:
            self._reader = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
        except (RuntimeError, ValueError) as error:
            raise UnreadableVideoError(f"{path} {_why(error)}") from error
        self._path, self.num_frames = path, len(self._reader)
        self.fps = float(self._reader.metadata.average_fps or 0)

    def read(self, indices: Sequence[int]) -> Frames:
        try:
            return self._reader.get_frames_at(indices=list(indices)).data.numpy()
        except (RuntimeError, IndexError) as error:
            raise UnreadableVideoError(f"{self._path} {_why(error)}") from error


_READERS: dict[str, Any] = {"decord": _DecordReader, "torchcodec": _TorchcodecReader}


def open_video(path: str | os.PathLike[str], *, decoder: Decoder = "auto") -> VideoReader:
    """Open a video for reading.

    Args:
        path: of the file.
        decoder: ``"decord"``, ``"torchcodec"`` (which also reads AV1, and needs FFmpeg on the system), or
            ``"auto"``: decord where it is installed, else torchcodec.

    Raises:
        UnreadableVideoError: when the file is missing, empty, cut short, no video, or of a codec that the
            decoder does not know; the message says which.
        ImportError: when the decoder is not installed.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UnreadableVideoError(f"{path}: no such file")
    if os.path.getsize(path) == 0:
        raise UnreadableVideoError(f"{path}: the file is empty")
    reader: VideoReader = _READERS[_choose(decoder)](path)
    if reader.num_frames < 1:
        raise UnreadableVideoError(f"{path}: holds no frames")
    return reader


def clip_indices(num_frames: int, *, length: int, step: float = 1.0, start: float = 0.0) -> list[int]:
    """Which frames of a video make a clip.

    Args:
        num_frames: of the video.
        length: frames of the clip.
        step: frames of the video from one of the clip to the next.
        start: where it begins, 0 (at the first frame) to 1 (as late as possible).

    Raises:
        UnreadableVideoError: when the video is too short for the clip.
    """
    span = int((length - 1) * step) + 1
    if span > num_frames:
        raise UnreadableVideoError(
            f"the clip is shorter than asked: {length} frames, each {step:g} after the one before, need "
            f"{span}, and there are {num_frames}"
        )
    first = min(int(start * (num_frames - span + 1)), num_frames - span)
    return [first + int(i * step) for i in range(length)]


def write_video(frames: Frames, path: str | os.PathLike[str], *, fps: float) -> None:
    """Write an MP4 (H.264, 4:2:0, as every player and browser takes), under another name first.

    Args:
        frames: uint8 ``[F, H, W, 3]`` or ``[F, H, W]``. An odd height or width is enlarged by one.
        path: ends in .mp4; what is there is replaced.
        fps: frames per second.

    Raises:
        ValueError: for frames of another kind.
        ImportError: without the packages imageio and imageio-ffmpeg, which bring their own FFmpeg.
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
    write_file(
        path, lambda file: export_to_video(images, str(file), fps=fps, quality=9.0, macro_block_size=2)
    )


def require_video_writer() -> None:
    """Check, before hours are spent, that videos can be written.

    Raises:
        ImportError: without the packages imageio and imageio-ffmpeg.
    """
    if find_spec("imageio") is None or find_spec("imageio_ffmpeg") is None:
        # diffusers would fall back to OpenCV, whose MP4 files browsers do not play.
        raise ImportError("videos are written with imageio-ffmpeg: pip install mhla-diffusion[video]")


def _choose(decoder: Decoder) -> str:
    if decoder != "auto":
        if find_spec(decoder) is None:
            raise ImportError(f"the video decoder {decoder} is not installed: pip install {decoder}")
        return decoder
    for name in _READERS:
        if find_spec(name) is not None:
            return name
    raise ImportError("reading videos needs decord (or torchcodec): pip install mhla-diffusion[video]")


def _why(error: Exception) -> str:
    """What a decoder's message means."""
    text = str(error)
    if "cannot find video stream" in text:
        return "holds no video that decord knows: audio alone, or AV1, which the decoder torchcodec reads"
    if "Error reading" in text:
        return "is no video, or only the beginning of one"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"cannot be decoded ({lines[-1] if lines else type(error).__name__})"
