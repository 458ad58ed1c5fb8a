"""Which frames of a video are damaged, as far as FFmpeg's decoders can tell.

Most conceal damage without a word: they repeat what was there before, or go on with wrong pixels. Asked to,
they give up at the first packet that is not as it should be; all that refers to it is then as wrong. Damage
that leaves valid packets behind stays unknown, as most formats have no checksums, and so does that of H.264
and HEVC whose key pictures refer to what was before them. docs/reliability.md has counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from .video_packets import OpenVideo, clean_start_test, file_stamp, open_stream

if TYPE_CHECKING:
    from av.packet import Packet


def give_up_at_damage(video: OpenVideo) -> None:
    """Let a decoder raise an error where it would conceal damage; before the first packet is decoded."""
    video.stream.codec_context.options = {"err_detect": "explode+crccheck"}


def damaged_packets(path: str) -> frozenset[int]:
    """Numbers of the packets of a video whose frames are damaged, or refer to one that is.

    The whole file is decoded; a process remembers what came of the last 128.

    Raises:
        UnreadableVideoError: when it is no video.
    """
    return _damaged_packets(path, file_stamp(path))


@lru_cache(maxsize=128)
def _damaged_packets(path: str, stamp: tuple[int, ...]) -> frozenset[int]:
    with open_stream(path) as video:
        give_up_at_damage(video)
        search = _Search(video)
        for _ in video.decode(iter(search), on_error=search.note_error):
            pass
    return frozenset(search.damaged)


class _Search:
    """Packets with their numbers, and which of them are damaged."""

    def __init__(self, video: OpenVideo) -> None:
        self._video, self._last = video, -1
        self._complete = self._wrong = False
        self.damaged: set[int] = set()

    def __iter__(self) -> Iterator[tuple[int, Packet]]:
        is_clean_start = clean_start_test(self._video.stream)
        for number, packet in enumerate(self._video.packets()):
            self._last = number
            if packet.is_keyframe and is_clean_start is not None and is_clean_start(memoryview(packet)):
                self._complete, self._wrong = True, False
            if self._wrong:
                self.damaged.add(number)
            yield number, packet

    def note_error(self) -> None:
        """Take the last packet for damaged, and those up to the next start; where all that was is there."""
        if self._complete:
            self._wrong = True
            self.damaged.add(self._last)
