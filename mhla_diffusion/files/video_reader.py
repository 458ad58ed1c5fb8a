"""Reading the frames of a video by their numbers, through its index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .pictures import WHITE, flat_picture
from .video_damage import damaged_packets, give_up_at_damage
from .video_index import VideoIndex, video_index
from .video_packets import OpenVideo, UnreadableVideoError, open_stream, place_of

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Frames = NDArray[np.uint8]


class _AstrayError(Exception):
    """Decoding did not give the frames that the index promised."""


class IndexedReader:
    """Frames by number, as FFmpeg gives them when it decodes the whole file.

    Nothing is held open between reads, so that readers may cross a fork and be used by several threads.

    Args:
        path: of the file.
        background: colour behind transparent pixels.

    Attributes:
        num_frames: that are shown.
        fps: frames per second, the mean where they vary.
        times: seconds ``[num_frames]`` from the first frame to each, None when the rate is constant.

    Raises:
        UnreadableVideoError: when it is no video, or only a part of one.
    """

    def __init__(self, path: str, background: str = WHITE) -> None:
        self._path, self._index, self._background = path, video_index(path), background
        self.num_frames, self.fps, self.times = self._index.num_frames, self._index.fps, self._index.times

    def read(self, indices: Sequence[int]) -> Frames:
        """Return the frames at ``indices``, uint8 ``[n, H, W, 3]``, in RGB and upright.

        Raises:
            UnreadableVideoError: when one is not there or cannot be decoded.
        """
        require_frames(self._path, self.num_frames, indices)
        wanted = sorted(set(indices))
        try:
            found = _read_from_starts(self._path, self._index, wanted, self._background)
        except _AstrayError:
            found = _read_from_beginning(self._path, self._index, wanted, self._background)
        return np.stack([found[index] for index in indices])


def require_frames(path: str, num_frames: int, indices: Sequence[int]) -> None:
    """Check that frames are there.

    Raises:
        UnreadableVideoError: when one is not, or none is asked for.
    """
    if not len(indices) or min(indices) < 0 or max(indices) >= num_frames:
        raise UnreadableVideoError(f"{path} has the frames 0 to {num_frames - 1}, asked were {list(indices)}")


def _read_from_starts(path: str, index: VideoIndex, wanted: list[int], background: str) -> dict[int, Frames]:
    """Decode from the nearest start before each frame; neighbouring starts are decoded through.

    Raises:
        _AstrayError: when this does not give the frames that the index promises.
    """
    if not len(index.starts):
        raise _AstrayError
    rows = np.array([index.start_of(frame) for frame in wanted])
    runs = np.cumsum(np.diff(rows, prepend=rows[0]) > 1)
    found: dict[int, Frames] = {}
    try:
        with open_stream(path) as video:
            give_up_at_damage(video)
            picture = _Picture(video, background)
            for _, run in groupby(range(len(wanted)), key=lambda i: runs[i]):
                members = [wanted[i] for i in run]
                frames = _decode_from(video, index, index.start_of(members[0]), last=members[-1])
                found |= {number: picture.pixels(frame) for number, frame in frames if number in members}
    except UnreadableVideoError as error:
        raise _AstrayError from error
    if len(found) < len(wanted):
        raise _AstrayError
    return found


def _decode_from(
    video: OpenVideo, index: VideoIndex, row: int, *, last: int
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames with their numbers, from a start to the frame ``last``.

    Raises:
        _AstrayError: when they do not follow each other as in the index.
    """
    first = int(index.starts[row, 1]) if row >= 0 else -1
    previous = None
    for packet, frame in video.decode(_packets_from(video, index, row)):
        number = int(index.frame_of[packet]) if packet >= 0 else -1
        if number < first:
            continue  # refers to frames before the start
        in_order = previous is None or number == previous + 1
        # Some files call frames starts that refer to others.
        if frame.is_corrupt or number < 0 or not in_order or (number == first and not frame.key_frame):
            raise _AstrayError
        previous = number
        yield number, frame
        if number >= last:
            return


def _packets_from(video: OpenVideo, index: VideoIndex, row: int) -> Iterator[tuple[int, Packet]]:
    """Packets from a start on with their numbers, each held against the index."""
    start = int(index.starts[row, 0]) if row >= 0 else 0
    packets, number = video.packets(), 0
    if start:
        packets, number = _seek(video, index, row)
    for packet in packets:
        if number >= start:
            if number >= len(index.packets) or tuple(index.packets[number]) != place_of(packet):
                raise _AstrayError
            yield number, packet
        number += 1


def _seek(video: OpenVideo, index: VideoIndex, row: int) -> tuple[Iterator[Packet], int]:
    """Packets from one at or before a start, and the number of the first."""
    start, _, *moments = index.starts[row].tolist()
    for moment in moments:
        video.container.seek(moment, stream=video.stream)
        packets = video.packets()
        # The first ones may be parts of packets.
        first = next((packet for packet in packets if index.number_of(packet) >= 0), None)
        if first is not None and index.number_of(first) <= start:
            return chain([first], packets), index.number_of(first)
    raise _AstrayError


def _read_from_beginning(
    path: str, index: VideoIndex, wanted: list[int], background: str
) -> dict[int, Frames]:
    """Decode the whole file up to the last frame, as FFmpeg does.

    Raises:
        UnreadableVideoError: when frames are lost, so that numbers would mean others, or are damaged.
    """
    found: dict[int, Frames] = {}
    with open_stream(path) as video:
        picture, numbers = _Picture(video, background), set(wanted)
        frames = video.decode(enumerate(video.packets()), on_error=lambda: None)
        for number, (packet, frame) in enumerate(frames):
            if number in numbers and packet == index.shown[number]:
                found[number] = picture.pixels(frame)
            if number == wanted[-1]:
                break
    lost = [number for number in wanted if number not in found]
    if lost:
        raise UnreadableVideoError(f"{path} is damaged: the frames up to {lost[0]} are not all there")
    damaged = damaged_packets(path)
    # Of a frame whose packet is unknown it is not known either.
    wrong = [number for number in wanted if damaged and index.shown[number] in damaged | {-1}]
    if wrong:
        raise UnreadableVideoError(f"{path} is damaged: frame {wrong[0]} is not what was encoded")
    return found


class _Picture:
    """Frames as pixels: RGB, upright, square, all of the size of the first."""

    def __init__(self, video: OpenVideo, background: str) -> None:
        from av.video.reformatter import VideoReformatter

        self._reformatter, self._background = VideoReformatter(), background
        self._width, self._height = _square_size(video.stream)

    def pixels(self, frame: VideoFrame) -> Frames:
        transparent = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
        pixels = self._reformatter.reformat(
            frame, width=self._width, height=self._height, format="rgba" if transparent else "rgb24",
            interpolation="BICUBIC", threads=1,
        ).to_ndarray()  # fmt: skip
        if transparent:
            pixels = np.asarray(flat_picture(Image.fromarray(pixels), self._background))
        return _upright(cast(Frames, pixels), display_matrix(frame))


def _square_size(stream: VideoStream) -> tuple[int, int]:
    """Width and height of a frame whose pixels are square: the shorter side of its pixels is enlarged."""
    width, height = stream.codec_context.width, stream.codec_context.height
    wide = pixel_aspect(stream)
    return (round(width * wide), height) if wide > 1 else (width, round(height / wide))


def pixel_aspect(stream: VideoStream) -> float:
    """Return width by height of a pixel; 1 where it is not stored, or beyond what any camera records."""
    wide = float(stream.sample_aspect_ratio or 1)
    return wide if 0.25 <= wide <= 4 else 1.0


def display_matrix(frame: VideoFrame) -> NDArray[np.int32] | None:
    """Matrix ``[2, 2]`` that phones store: the place ``(x, y) @ matrix`` is where a pixel is shown."""
    from av.sidedata.sidedata import Type

    data = cast(Any, frame.side_data).get(Type.DISPLAYMATRIX)
    return None if data is None else np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2]


def _upright(rgb: Frames, matrix: NDArray[np.int32] | None) -> Frames:
    """Turn and mirror by the nearest quarter turn."""
    if matrix is None:
        return rgb
    (a, b), (c, d) = matrix.tolist()
    turned = abs(a) < abs(b)
    rgb = rgb.swapaxes(0, 1) if turned else rgb
    right, down = (c, b) if turned else (a, d)
    return rgb[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]
