"""Video files as FFmpeg's libraries give them: packets in the order of the file, and the frames in them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream


class UnreadableVideoError(ValueError):
    """File that is no video that can be read; the message says why."""


@dataclass(frozen=True)
class OpenVideo:
    """Video stream of a file that is open."""

    container: InputContainer
    stream: VideoStream

    def packets(self) -> Iterator[Packet]:
        """Packets from here on; the empty ones stand for frames that were never stored."""
        return (packet for packet in self.container.demux(self.stream) if packet.size)

    def decode(
        self, packets: Iterable[tuple[int, Packet]], on_error: Callable[[], Any] | None = None
    ) -> Iterator[tuple[int, VideoFrame]]:
        """Frames in the order in which they are shown, each with the number of the packet that held it.

        The number is -1 where a decoder does not say it.

        Args:
            packets: with their numbers, in the order of the file.
            on_error: called for each packet that cannot be decoded, which is passed over then, as FFmpeg
                does. Without it the error is raised.
        """
        from av.error import FFmpegError

        for packet in _numbered(packets):
            try:
                frames = self.stream.decode(packet)
            except FFmpegError:
                if on_error is None:
                    raise
                on_error()
            else:
                for frame in frames:
                    yield cast("list[int]", frame.opaque or [-1])[0], frame


def _numbered(packets: Iterable[tuple[int, Packet]]) -> Iterator[Packet | None]:
    for number, packet in packets:
        packet.opaque = [number]  # an object of its own, as PyAV finds it by its identity
        yield packet
    yield None  # what the decoder still holds


@contextmanager
def open_stream(path: str) -> Iterator[OpenVideo]:
    """Open the video in a file, which may not draw in other files or the network.

    Raises:
        UnreadableVideoError: when it is missing, no regular file, empty or no video, or later when it turns
            out to be damaged.
    """
    import av

    file_stamp(path)
    try:
        # A file that Python opened has no name that FFmpeg could take for a protocol or a pattern.
        with (
            open(path, "rb", buffering=0) as file,
            av.open(
                file,
                "r",
                options={"protocol_whitelist": "none"},
                metadata_errors="replace",
                buffer_size=1 << 16,
            ) as container,
        ):
            yield OpenVideo(container, _video_of(container, path))
    except (av.FFmpegError, OSError) as error:
        raise UnreadableVideoError(f"{path} {_why(error)}") from error


def file_stamp(path: str) -> tuple[int, ...]:
    """Return what changes when a file is replaced: device, inode, bytes, time of the last change.

    Raises:
        UnreadableVideoError: when it is missing, empty, or not a regular file (a pipe would wait for ever).
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, ValueError) as error:
        raise UnreadableVideoError(f"{path}: no such file") from error
    except OSError as error:
        raise UnreadableVideoError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableVideoError(f"{path}: is not a regular file")
    if status.st_size == 0:
        raise UnreadableVideoError(f"{path}: the file is empty")
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _video_of(container: InputContainer, path: str) -> VideoStream:
    from av.stream import Disposition

    # The picture on the cover of a song is stored as a video, too.
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise UnreadableVideoError(f"{path} holds no video: audio alone, or other data")
    best = container.streams.best("video")
    stream = next((s for s in streams if best is not None and s.index == best.index), streams[0])
    if stream.codec_context is None:
        raise UnreadableVideoError(f"{path} holds a video of a codec that cannot be decoded here")
    stream.codec_context.thread_count = 1  # files are read by several workers
    stream.codec_context.copy_opaque = True  # so that frames know their packets
    return stream


def _why(error: Exception) -> str:
    """What an error of FFmpeg's means."""
    from av.error import EOFError as FileEndError
    from av.error import InvalidDataError

    if isinstance(error, InvalidDataError | FileEndError):
        return "is no video, or only the beginning of one"
    return f"cannot be decoded ({error.strerror if isinstance(error, OSError) else error})"


def place_of(packet: Packet) -> tuple[int, int]:
    """Return where a packet lies in its file, and its bytes."""
    return -1 if packet.pos is None else packet.pos, packet.size


def whole_packet_test(stream: VideoStream) -> Callable[[memoryview], bool]:
    """Cheap test of the first bytes of a packet: is it one that the decoder makes one frame of?

    A damaged packet may give none, so that the frames after it would be counted wrong. Codecs for which
    nothing is known pass.
    """
    picture_test = _picture_test(stream, {"h264": range(1, 6), "hevc": range(32)})
    return picture_test or {
        "mpeg4": lambda data: data[:3] == b"\0\0\1" and len(data) > 8,  # shorter ones repeat the last frame
        "vp8": lambda data: bool(data[0] & 0x10),  # the others are not shown
        "vp9": lambda data: data[0] >> 6 == 2,
        "av1": lambda data: not data[0] & 0x80,
    }.get(_codec_of(stream), lambda data: True)


def restart_test(stream: VideoStream) -> Callable[[memoryview], bool] | None:
    """Test of a packet: does any decoder restart there, whatever it read before?

    Files mark other packets as keys, too: where the picture is refreshed bit by bit, or by mistake. None for
    other codecs than H.264 (IDR pictures) and HEVC (BLA, IDR and CRA pictures) in units with their sizes.
    """
    return _picture_test(stream, {"h264": range(5, 6), "hevc": range(16, 22)})


def clean_start_test(stream: VideoStream) -> Callable[[memoryview], bool] | None:
    """Test of a key packet: does nothing after it refer to what was before? None where it is not known.

    Where a video was cut, pictures after other starts may refer to some that are gone, which is no damage.
    """
    known = _picture_test(stream, {"h264": range(5, 6), "hevc": range(16, 21)})
    return known or (None if _codec_of(stream) in ("h264", "hevc") else lambda data: True)


def _codec_of(stream: VideoStream) -> str:
    return stream.codec_context.codec.canonical_name


def _picture_test(stream: VideoStream, kinds: dict[str, range]) -> Callable[[memoryview], bool] | None:
    """Test for pictures whose units are of these kinds; None where units cannot be told apart."""
    name, extra = _codec_of(stream), stream.codec_context.extradata or b""
    if name == "h264" and len(extra) > 6 and extra[0] == 1:
        test = partial(_is_picture, prefix=(extra[4] & 3) + 1, header=1, mask=0x1F, shift=0)
    elif name == "hevc" and len(extra) > 22 and extra[0] == 1:
        test = partial(_is_picture, prefix=(extra[21] & 3) + 1, header=2, mask=0x7E, shift=1)
    else:
        return None
    return partial(test, kinds=kinds[name])


def _is_picture(data: memoryview, *, prefix: int, header: int, kinds: range, mask: int, shift: int) -> bool:
    """Check that a packet is whole units of H.264 or HEVC, each after its size, and begins a picture."""
    place, pictures = 0, 0
    while place + prefix + header < len(data):
        unit = place + prefix
        if data[unit] & 0x80:
            return False
        if (data[unit] & mask) >> shift in kinds:
            # The first bit of a slice: it is the first of its picture.
            pictures += data[unit + header] >> 7
        place = unit + int.from_bytes(data[place:unit], "big")
    return place == len(data) and pictures > 0
