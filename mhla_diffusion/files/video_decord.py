"""Reading videos with decord where it is proven right.

decord counts packets, not times of presentation. That gives other frames than asked for in AVI and transport
streams, in files with open groups of pictures, and in those that were cut without encoding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import numpy as np

from ..optional import require
from .video_damage import give_up_at_damage
from .video_index import VideoIndex, video_index
from .video_packets import OpenVideo, UnreadableVideoError, file_stamp, open_stream, restart_test
from .video_reader import Frames, display_matrix, pixel_aspect, require_frames

if TYPE_CHECKING:
    from av.packet import Packet
    from decord import VideoReader

# Containers in which decord seeks to the packet that it looks for.
_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
_FORMATS = {"yuv420p", "yuvj420p"}


class DecordReader:
    """Frames by number, as decord gives them.

    A file is read only if it is proven that decord finds its frames: H.264 or HEVC in MP4, MOV or MKV, 4:2:0
    of 8 bits, of square pixels, neither turned nor mirrored; PyAV decodes all of it without an error; each of
    its key packets is a point of restart; and decord counts the frames, their times and the key frames that
    its :class:`~mhla_diffusion.files.video_index.VideoIndex` has. The proof takes as long as decoding the
    file once. A process remembers it for the last 128 files.

    Nothing is held open between reads, so that readers may cross a fork and be used by several threads.

    Args:
        path: of the file.

    Attributes:
        num_frames: that are shown.
        fps: frames per second, the mean where they vary.
        times: seconds ``[num_frames]`` from the first frame to each, None when the rate is constant.

    Raises:
        UnreadableVideoError: when it is no video, only a part of one, or decord is not proven right.
        ImportError: without the package decord.
    """

    def __init__(self, path: str) -> None:
        require("decord")
        self._path, self._index = path, video_index(path)
        self.num_frames, self.fps, self.times = self._index.num_frames, self._index.fps, self._index.times
        _require_right(path, file_stamp(path))

    def read(self, indices: Sequence[int]) -> Frames:
        """Return the frames at ``indices``, uint8 ``[n, H, W, 3]``, in RGB and upright.

        Raises:
            UnreadableVideoError: when one is not there or cannot be decoded.
        """
        require_frames(self._path, self.num_frames, indices)
        reader = _open(self._path, self._index)
        wanted = sorted(set(indices))
        frames = dict(zip(wanted, _decoded(self._path, reader, wanted), strict=True))
        return np.stack([frames[index] for index in indices])


@lru_cache(maxsize=128)
def _require_right(path: str, stamp: tuple[int, ...]) -> None:
    index = video_index(path)
    with open_stream(path) as video:
        doubt = _doubt_of_kind(video) or _doubt_of_frames(video, index)
    if doubt is not None:
        raise _refusal(path, doubt)
    _open(path, index)


def _doubt_of_kind(video: OpenVideo) -> str | None:
    """Why decord may not know how to read a video; None when there is no reason."""
    container, context = video.container.format.name, video.stream.codec_context
    if container not in _CONTAINERS or restart_test(video.stream) is None:
        kind = f"{context.codec.canonical_name} in {container.split(',')[0]}"
        return f"it is {kind}, not H.264 or HEVC in MP4, MOV or MKV"
    if context.pix_fmt not in _FORMATS:
        return f"its pixels are {context.pix_fmt}, not {' or '.join(sorted(_FORMATS))}"
    if pixel_aspect(video.stream) != 1:
        return f"its pixels are not square ({video.stream.sample_aspect_ratio})"
    return None


def _doubt_of_frames(video: OpenVideo, index: VideoIndex) -> str | None:
    """Why decord may give other frames; None when there is no reason.

    The video is decoded, as decord conceals damage without a word.
    """
    give_up_at_damage(video)
    is_restart, keys, errors = restart_test(video.stream), list[bool](), list[None]()

    def packets() -> Iterator[tuple[int, Packet]]:
        for number, packet in enumerate(video.packets()):
            if packet.is_keyframe and is_restart is not None:
                keys.append(is_restart(memoryview(packet)))
            yield number, packet

    shown = []
    for number, frame in video.decode(packets(), on_error=lambda: errors.append(None)):
        if display_matrix(frame) is not None:
            return "it is stored turned or mirrored"
        shown.append(-1 if frame.is_corrupt else number)
    if not all(keys):
        return "decoding cannot start at each of its key frames"
    if errors or shown != index.shown.tolist():
        return "some of its frames cannot be decoded: it is damaged, or was cut without encoding"
    return None


def _open(path: str, index: VideoIndex) -> VideoReader:
    """Open a file with decord.

    Raises:
        UnreadableVideoError: when its frames, their times or the key frames are not those of the index.
    """
    import decord

    try:
        # One thread, as files are read by several workers; no path from / on is taken for a protocol.
        reader = decord.VideoReader(os.path.abspath(path), num_threads=1)
    except (decord.DECORDError, RuntimeError, UnicodeError) as error:
        raise _refusal(path, f"it cannot open it ({_last_line(error)})") from error
    if len(reader) != index.num_frames:
        raise _refusal(path, f"it counts {len(reader)} frames where {index.num_frames} are shown")
    times = np.asarray(reader.get_frame_timestamp(range(len(reader))))[:, 0]
    if index.seconds is None or not np.allclose(times - times[0], index.seconds, rtol=1e-6, atol=1e-3):
        raise _refusal(path, "its times of the frames are not those of the file")
    if [int(key) for key in reader.get_key_indices()] != index.starts[:, 1].tolist():
        raise _refusal(path, "its key frames are not those of the file, which has open groups of pictures")
    return reader


def _decoded(path: str, reader: VideoReader, indices: list[int]) -> list[Frames]:
    import decord

    try:
        return list(reader.get_batch(indices).asnumpy())
    except (decord.DECORDError, RuntimeError) as error:
        if "size must exactly match" not in str(error):
            raise UnreadableVideoError(f"{path} cannot be decoded ({_last_line(error)})") from error
    return [_without_padding(reader[index].asnumpy()) for index in indices]


def _without_padding(frame: Frames) -> Frames:
    """Frames of some small widths (16 and 48 among them) come from decord with padded rows.

    They are then declared ``[H, W, 4]`` or more, and reading them in batches fails.
    """
    height, width, channels = frame.shape
    if channels == 3:
        return frame
    return cast(Frames, frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3))


def _refusal(path: str, doubt: str) -> UnreadableVideoError:
    return UnreadableVideoError(
        f"{path}: decord would not give the right frames, as {doubt}; read it with decoder 'auto' or 'pyav'"
    )


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
