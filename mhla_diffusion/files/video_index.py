"""Which packets of a file hold the frames of a video, in the order in which they are shown.

Files store frames in the order of decoding, and more of them than are shown: those that an edit list hides,
or whose references were cut off. Where packets say so surely when each frame is shown, they are read and
nothing is decoded; every other file is decoded once from its start, as FFmpeg does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from .video_packets import (
    OpenVideo,
    UnreadableVideoError,
    file_stamp,
    open_stream,
    place_of,
    whole_packet_test,
)

if TYPE_CHECKING:
    from av.packet import Packet

Numbers = NDArray[np.int64]

# Containers that store when each frame is shown.
_TIMED = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv", "mpegts"}
# Those that store frames one by one; with codecs that show them in the order of decoding that is enough.
_ORDERED = {"avi", "asf"}
_FORWARD = {"ffv1", "png", "mpeg4", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2", "flv1", "h263", "vp8"}
# Codecs that show one frame for each packet, though in another order.
_REORDERED = {"h264", "hevc", "mpeg1video", "mpeg2video", "vp9", "av1"}
_PROGRESSIVE = 1  # AV_FIELD_PROGRESSIVE


@dataclass(frozen=True)
class VideoIndex:
    """Frames of a video.

    Args:
        shown: number of the packet of each frame ``[F]``, in the order in which they are shown. Packets are
            numbered in the order of the file.
        packets: place in the file and bytes of each packet ``[P, 2]``.
        starts: where decoding can start ``[S, 4]``: number of the packet, of its frame, and its times of
            presentation and decoding in units of the file; empty when it must start at the beginning.
        fps: frames per second, the mean where they vary.
        seconds: ``[F]`` from the first frame to each, None where the file does not say it.
        even: the rate is constant.
    """

    shown: Numbers
    packets: Numbers
    starts: Numbers
    fps: float
    seconds: NDArray[np.float64] | None
    even: bool

    @property
    def num_frames(self) -> int:
        return len(self.shown)

    @property
    def times(self) -> NDArray[np.float64] | None:
        """Seconds ``[F]`` from the first frame to each, None when the rate is constant."""
        return None if self.even else self.seconds

    @cached_property
    def frame_of(self) -> Numbers:
        """Number of the frame in each packet ``[P]``; -1 where it is not shown."""
        frames = np.full(len(self.packets), -1)
        known = self.shown >= 0
        frames[self.shown[known]] = np.flatnonzero(known)
        return frames

    def start_of(self, frame: int) -> int:
        """Row of ``starts`` from which a frame can be decoded; -1 for the beginning of the file."""
        row = int(np.searchsorted(self.starts[:, 1], frame, side="right")) - 1
        while row >= 0 and self.starts[row, 0] > self.shown[frame]:
            row -= 1
        return row

    def number_of(self, packet: Packet) -> int:
        """Number of a packet, -1 when it is unknown or there are several like it."""
        rows = np.flatnonzero((self.packets == place_of(packet)).all(axis=1))
        return int(rows[0]) if len(rows) == 1 else -1


def video_index(path: str) -> VideoIndex:
    """Index a file, once for each process and state of the file.

    The last 128 are remembered. A film of ten minutes takes less than half a second where its packets
    can be trusted, and as long as decoding it once elsewhere.

    Raises:
        UnreadableVideoError: when it is no video, or only a part of one.
    """
    return _video_index(path, file_stamp(path))


@lru_cache(maxsize=128)
def _video_index(path: str, stamp: tuple[int, ...]) -> VideoIndex:
    with open_stream(path) as video:
        records = _Records(video)
        packets = iter(records)
        first = next(video.decode(packets, on_error=records.count_error), None)
        for _ in packets:
            pass
        _require_whole(video, records, path)
        shown = None if first is None else _order_of(video, records, first[0])
        if shown is not None:
            return _index(video, records, shown, [records.pts[number] for number in shown], seekable=True)
    return _decoded_index(path)


def _decoded_index(path: str) -> VideoIndex:
    with open_stream(path) as video:
        records = _Records(video)
        decoded = video.decode(iter(records), on_error=records.count_error)
        frames = [(number, frame.pts, frame.is_corrupt) for number, frame in decoded]
        if not frames:
            raise UnreadableVideoError(f"{path} cannot be decoded: none of its frames is whole")
        numbers, times, corrupt = map(list, zip(*frames, strict=True))
        known = _codec(video) in _FORWARD | _REORDERED or video.stream.codec_context.codec.intra_only
        sound = not (records.errors or any(corrupt)) and len(set(numbers) - {-1}) == len(numbers)
        return _index(video, records, np.array(numbers), times, seekable=known and sound)


class _Records:
    """What is known of each packet of a video, noted while they pass.

    Attributes:
        places: where each lies in the file, and how many bytes it has.
        pts, dts: its times of presentation and decoding; None when not stored.
        keys, hidden: the numbers of those that decoding can start at, and of those that are not shown.
        errors: how many are damaged.
    """

    def __init__(self, video: OpenVideo) -> None:
        self._video = video
        self.places: list[tuple[int, int]] = []
        self.pts: list[int | None] = []
        self.dts: list[int | None] = []
        self.keys: list[int] = []
        self.hidden: set[int] = set()
        self.errors = 0

    def __iter__(self) -> Iterator[tuple[int, Packet]]:
        is_whole = whole_packet_test(self._video.stream)
        for number, packet in enumerate(self._video.packets()):
            self.places.append(place_of(packet))
            self.pts.append(packet.pts)
            self.dts.append(packet.dts)
            if packet.is_keyframe:
                self.keys.append(number)
            if packet.is_discard:
                self.hidden.add(number)
            if packet.is_corrupt or not is_whole(memoryview(packet)):
                self.count_error()
            yield number, packet

    def count_error(self) -> None:
        self.errors += 1


def _codec(video: OpenVideo) -> str:
    return video.stream.codec_context.codec.canonical_name


def _require_whole(video: OpenVideo, records: _Records, path: str) -> None:
    """MP4 and MOV list their packets, so that those which are missing at the end are known."""
    listed = len(video.stream.index_entries)
    if video.container.format.name.startswith("mov") and len(records.places) < listed:
        raise UnreadableVideoError(
            f"{path} is only the beginning of a video: {len(records.places)} of {listed} packets are there"
        )


def _order_of(video: OpenVideo, records: _Records, first: int) -> Numbers | None:
    """The packets of the frames that are shown, in their order; None when packets do not say it surely.

    Args:
        video: whose packets were read.
        records: of them.
        first: the number of the packet that held the first frame decoded. Those that are to be shown before
            it cannot be decoded: they refer to frames that were cut off.
    """
    forward = _is_forward(video)
    if forward is None or records.errors or first < 0 or records.pts[first] is None:
        return None
    visible = [number for number in range(len(records.pts)) if number not in records.hidden]
    times = {number: _or_earliest(records.pts[number]) for number in visible}
    shown = np.array([number for number in visible if times[number] >= times[first]])
    cut_off = set(visible) - set(shown.tolist())
    if max(cut_off, default=0) >= (records.keys[1] if len(records.keys) > 1 else len(visible)):
        return None
    pts = np.array([times[number] for number in shown])
    order = np.argsort(pts, kind="stable")
    in_file_order = bool((np.diff(order) == 1).all())
    if (np.diff(pts[order]) == 0).any() or (forward and not in_file_order):
        return None
    # Decoders that hold frames back, and times that run on, contradict each other.
    if not forward and video.stream.codec_context.has_b_frames and in_file_order and len(shown) > 1:
        return None
    return shown[order] if _closed_at_keys(shown, pts, records.keys) else None


def _or_earliest(pts: int | None) -> float:
    """Matroska stores no times before 0."""
    return -np.inf if pts is None else pts


def _is_forward(video: OpenVideo) -> bool | None:
    """Frames are shown in the order of decoding; None when neither this nor their times can be trusted."""
    context, container = video.stream.codec_context, video.container.format.name
    name = _codec(video)
    if context.codec.intra_only or (name in _FORWARD and not context.has_b_frames):
        return True if container in _TIMED | _ORDERED else None
    # In a transport stream each field of an interlaced frame may be a packet. PyAV 17 does not tell.
    progressive = getattr(context, "field_order", None) == _PROGRESSIVE
    fields = container == "mpegts" and name == "h264" and not progressive
    return False if container in _TIMED and name in _REORDERED and not fields else None


def _closed_at_keys(shown: Numbers, pts: NDArray[Any], keys: Sequence[int]) -> bool:
    """Nothing before a key packet is shown after anything that follows it; files glued together differ."""
    latest, earliest = np.maximum.accumulate(pts), np.minimum.accumulate(pts[::-1])[::-1]
    cuts = np.searchsorted(shown, keys)
    cuts = cuts[(cuts > 0) & (cuts < len(shown))]
    return bool((latest[cuts - 1] < earliest[cuts]).all())


def _index(
    video: OpenVideo, records: _Records, shown: Numbers, moments: Sequence[int | None], *, seekable: bool
) -> VideoIndex:
    frame_of = dict(zip(shown.tolist(), range(len(shown)), strict=False)) if seekable else {}
    starts = [
        (number, frame_of[number], pts, pts if dts is None else dts)
        for number, pts, dts in (
            (number, records.pts[number], records.dts[number]) for number in records.keys
        )
        if number in frame_of and pts is not None
    ]
    fps, seconds, even = _timing(video, moments)
    return VideoIndex(
        shown=shown,
        packets=np.array(records.places, np.int64).reshape(-1, 2),
        starts=np.array(starts, np.int64).reshape(-1, 4),
        fps=fps,
        seconds=seconds,
        even=even,
    )


def _timing(video: OpenVideo, pts: Sequence[int | None]) -> tuple[float, NDArray[np.float64] | None, bool]:
    """Frames per second, the seconds from the first frame to each if known, and are they evenly spaced?"""
    stream = video.stream
    stored = float(stream.average_rate or stream.guessed_rate or 25)
    if None in pts or stream.time_base is None:
        return stored, None, True
    times = (np.array(pts, np.float64) - cast(int, pts[0])) * float(stream.time_base)
    if len(times) < 2:
        return stored, times, True
    if (np.diff(times) <= 0).any():
        return stored, None, True  # times of decoding, which say nothing of the frames
    measured = float((len(times) - 1) / times[-1])
    late = times * measured - np.arange(len(times))
    # The stored rate is exact where times are rounded, to milliseconds for example.
    fps = stored if abs(stored / measured - 1) < 0.01 else measured
    # Times in milliseconds are off by half of one; a single frame that was dropped is half a frame late.
    return fps, times, bool(np.abs(late).max() <= max(0.1, 1e-3 * measured))
