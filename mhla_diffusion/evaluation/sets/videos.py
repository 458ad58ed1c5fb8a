"""Sets of videos, of each of which one clip is scored."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...files.videos import clip_indices, open_video
from .images import IMAGES
from .samples import Folder, Pixels, SampleKind, SampleSet

EXTENSIONS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v")


def open_videos(
    path: str | Path, *, frames: int = 16, stride: int = 1, seed: int = 0, frame_wise: bool = False
) -> SampleSet:
    """Open the videos in a folder or npy, a clip of each or, when ``frame_wise``, its frames; decode none.

    Raises:
        ValueError: when there is nothing at ``path``, no video in it, or a clip has no frames.
    """
    if frames < 1 or stride < 1:
        raise ValueError(f"frames and stride must be at least 1, got {frames} and {stride}")
    path = Path(path)
    kind = SampleKind(
        name="video",
        extensions=EXTENSIONS,
        read=partial(read_clip, frames=frames, stride=stride, seed=seed),
        conversion="RGB, 8 bits, as the decoder gives it; grayscale repeated",
        published_count=2_048,
        sampling=f"one clip a video, {frames} frames with stride {stride}, from a random frame (seed {seed})",
    )
    videos: Folder | ArrayVideos
    if path.is_dir():
        videos = Folder(path, kind)
    elif path.suffix == ".npy" and path.is_file():
        videos = ArrayVideos(path, kind, partial(_indices, frames=frames, stride=stride, seed=seed))
    else:
        raise ValueError(f"{path} is neither a folder of videos nor an .npy file")
    return FramesOfVideos(videos, frames) if frame_wise else videos


@dataclass
class ArrayVideos:
    """Videos of equal shape in an npy file, uint8 ``[N, F, H, W, 1 or 3]``, read one by one.

    Args:
        path: of the file.
        kind: see :class:`~mhla_diffusion.evaluation.sets.samples.SampleKind`.
        indices: maps the name of a video and the number of its frames to those of its clip.

    Raises:
        ValueError: when the file cannot be read or holds something else.
    """

    path: Path
    kind: SampleKind
    indices: Callable[[str, int], list[int]]
    names: list[str] = field(init=False)
    labels: list[int] | None = None
    class_names: dict[int, str] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    unlisted: int = 0

    def __post_init__(self) -> None:
        try:
            videos = self._open()
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{self.path} is not a whole npy file ({error}): write it again") from error
        shape = videos.shape
        if videos.dtype != np.uint8 or videos.ndim != 5 or shape[-1] not in (1, 3) or 0 in shape:
            raise ValueError(
                f"{self.path} is {videos.dtype} {list(shape)}; uint8 [N, F, H, W, 1 or 3] with N > 0 is "
                "expected (pixels in [0, 255])"
            )
        self.names = [f"[{index}]" for index in range(len(videos))]

    def _open(self) -> NDArray[Any]:
        return np.load(self.path, mmap_mode="r")

    def readers(self) -> Iterator[Callable[[], Pixels]]:
        for index, name in enumerate(self.names):
            yield partial(self._read, index, name)

    def _read(self, index: int, name: str) -> Pixels:
        # Mapped anew each time, as pages that were read count as memory of the process while they are mapped.
        video = self._open()[index]
        clip = video[self.indices(name, len(video))]
        return np.array(np.broadcast_to(clip, (*clip.shape[:3], 3)))

    def file(self, name: str) -> Path | None:
        return None


@dataclass
class FramesOfVideos:
    """Frames of a clip of each video, as images: ``name.mp4#0``, ``name.mp4#1``, ..."""

    videos: Folder | ArrayVideos
    frames: int
    names: list[str] = field(init=False)
    labels: list[int] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        videos = self.videos
        self.kind = replace(
            IMAGES,
            conversion=videos.kind.conversion,
            sampling=f"every frame of {videos.kind.sampling}",
            published_count=videos.kind.published_count * self.frames,
        )
        self.path, self.class_names = videos.path, videos.class_names
        self.manifest, self.unlisted = videos.manifest, videos.unlisted
        self.names = [f"{name}#{frame}" for name in videos.names for frame in range(self.frames)]
        if videos.labels is not None:
            self.labels = [label for label in videos.labels for _ in range(self.frames)]
        self.prompts = {
            f"{name}#{frame}": prompt
            for name, prompt in videos.prompts.items()
            for frame in range(self.frames)
        }

    def readers(self) -> Iterator[Callable[[], Pixels]]:
        for read in self.videos.readers():
            clip = _Once(read)  # decoded by the first of its frames that is read
            for frame in range(self.frames):
                yield partial(clip.frame, frame)

    def file(self, name: str) -> Path | None:
        return None  # a file has many frames: they are known by their pixels


class _Once:
    """Clip that several threads want frames of."""

    def __init__(self, read: Callable[[], Pixels]) -> None:
        self.read, self.lock = read, threading.Lock()
        self.clip: Pixels | None = None

    def frame(self, index: int) -> Pixels:
        with self.lock:
            if self.clip is None:
                self.clip = self.read()
        return self.clip[index]


def read_clip(path: Path, *, frames: int, stride: int, seed: int) -> Pixels:
    """Read one clip of a video, uint8 ``[F, H, W, 3]``.

    Raises:
        UnreadableVideoError: when it cannot be decoded or is too short.
    """
    reader = open_video(path)
    return reader.read(_indices(path.name, reader.num_frames, frames=frames, stride=stride, seed=seed))


def _indices(name: str, num_frames: int, *, frames: int, stride: int, seed: int) -> list[int]:
    """Choose the frames of a clip from a random one."""
    start = random.Random(f"{seed} {name}").random()
    return clip_indices(num_frames, length=frames, step=stride, start=start)
