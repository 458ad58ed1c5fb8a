"""Clips of videos: which frames make one, in one way for training and for scoring."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .video_packets import UnreadableVideoError

if TYPE_CHECKING:
    from .videos import VideoReader

RATE_TOLERANCE = 0.01
"""Share by which two rates may differ that are called the same: 23.976 frames a second are 24."""


def choose_clip(
    reader: VideoReader,
    *,
    length: int,
    fps: float | None = None,
    stride: int = 1,
    start: float = 0.0,
    first: int = 0,
    last: int | None = None,
) -> list[int]:
    """Choose the frames of a clip of a video, to be given to ``reader.read``.

    Args:
        reader: of the video.
        length: frames of the clip.
        fps: frames per second of the clip, see :func:`clip_at_rate`; None to count frames by ``stride``.
        stride: frames of the video from one of the clip to the next.
        start: where it begins, 0 (at the first frame) to 1 (as late as possible).
        first, last: frames that the part begins and ends with that it is taken out of; to the end when None.

    Raises:
        UnreadableVideoError: when the video is too short, or has too few frames a second.
    """
    end = reader.num_frames if last is None else last + 1
    if fps is None:
        chosen = clip_indices(end - first, length=length, stride=stride, start=start)
    else:
        times = np.arange(end) / reader.fps if reader.times is None else reader.times
        chosen = clip_at_rate(times[first:end], length=length, fps=fps, start=start)
    return [first + index for index in chosen]


def clip_indices(num_frames: int, *, length: int, stride: int = 1, start: float = 0.0) -> list[int]:
    """Choose the frames of a clip by counting them; arguments as for :func:`choose_clip`.

    Raises:
        UnreadableVideoError: when the video is too short for the clip.
    """
    span = (length - 1) * stride + 1
    if span > num_frames:
        raise UnreadableVideoError(
            f"the clip is shorter than asked: {length} frames, each {stride:g} after the one before, need "
            f"{span}, and there are {num_frames}"
        )
    first = _first(num_frames - span + 1, start)
    return [first + i * stride for i in range(length)]


def clip_at_rate(times: NDArray[np.float64], *, length: int, fps: float, start: float = 0.0) -> list[int]:
    """Choose the frames of a clip by the times at which they are shown.

    At each moment of the clip, ``1 / fps`` apart, that is the frame which the video shows then, or the next
    one if it begins within half a frame of the video; so times that are rounded or jitter choose as even ones
    do. Frames that the video holds for longer are repeated as it shows them.

    Args:
        times: seconds ``[N]`` at which the frames of the video are shown.
        length: frames of the clip.
        fps: frames per second of the clip. A video of up to 1 % fewer gives every frame: 23.976 is 24.
        start: where it begins, 0 to 1.

    Raises:
        UnreadableVideoError: when the video is too short, or has fewer frames a second than the clip.
    """
    frame = _frame_seconds(times) if len(times) > 1 else 1 / fps
    if length > 1 and fps * frame > 1 + RATE_TOLERANCE:
        raise UnreadableVideoError(
            f"it has {1 / frame:.5g} frames a second, and a clip of {fps:g} would show some twice: ask for "
            "fewer frames a second, or leave the video out"
        )
    moments = np.arange(length) * max(1 / fps, frame)
    # A hair later, as the moment of a frame must not fall before it by rounding.
    tolerance = frame / 2 + 1e-6
    choices = int(np.searchsorted(times, times[-1] + tolerance - moments[-1], side="right"))
    if choices < 1:
        raise UnreadableVideoError(
            f"the clip is shorter than asked: {length} frames at {fps:g} a second need {moments[-1]:.4g} "
            f"seconds from the first to the last, and there are {times[-1] - times[0]:.4g}"
        )
    first = _first(choices, start)
    shown = np.searchsorted(times, times[first] + moments + tolerance, side="right") - 1
    return [int(index) for index in shown]


def _frame_seconds(times: NDArray[np.float64]) -> float:
    """Seconds from one frame to the next where the rate is the usual one, without frames that are held."""
    seconds = np.diff(times)
    usual = np.abs(seconds / np.median(seconds) - 1) < 0.5
    return float(seconds[usual].mean())  # a median of times in milliseconds is off by as much as a percent


def _first(choices: int, start: float) -> int:
    return min(int(start * choices), choices - 1)
