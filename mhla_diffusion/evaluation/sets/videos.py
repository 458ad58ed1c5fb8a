"""Sets of videos, of each of which one clip is scored."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...files.arrays import describe_kind, file_kind, read_npy_header, require_regular
from ...files.clips import RATE_TOLERANCE, choose_clip, clip_indices
from ...files.manifest import MANIFEST
from ...files.pictures import VIDEO_CONVERSION, WHITE, background_color
from ...files.videos import FRAME_EXTENSIONS, VIDEO_EXTENSIONS, open_video
from .archives import open_archives
from .images import image_kind
from .samples import Folder, Pixels, SampleKind, SampleSet, find_files

RATES_LOOKED_AT = 32


def open_videos(
    path: str | Path,
    *,
    frames: int = 16,
    stride: int = 1,
    fps: float | None = None,
    seed: int = 0,
    frame_wise: bool = False,
    background: str = WHITE,
) -> SampleSet:
    """Open the videos of a set, a clip of each or, when ``frame_wise``, its frames; decode none.

    Args:
        path: folder of videos or of folders of frames (as StyleGAN-V has them), zip or tar of videos, or npy
            of clips, see :class:`ArrayVideos`.
        frames: of a clip.
        stride: frames of the video from one of the clip to the next.
        fps: frames per second of a clip, chosen by the time at which they are shown, in place of a stride.
        seed: of the frames at which clips begin.
        frame_wise: give frames, as images.
        background: colour behind transparent pixels.

    Raises:
        ValueError: when there is nothing at ``path``, no video in it, or a clip has no frames.
    """
    if frames < 1 or stride < 1:
        raise ValueError(f"frames and stride must be at least 1, got {frames} and {stride}")
    if fps is not None and (fps <= 0 or stride != 1):
        raise ValueError(f"fps must be positive and takes the place of stride, got {fps} and {stride}")
    background_color(background)
    path = Path(path)
    steps = f"with stride {stride}" if fps is None else f"at {fps:g} a second"
    kind = SampleKind(
        name="video",
        extensions=VIDEO_EXTENSIONS,
        read=partial(read_clip, frames=frames, stride=stride, fps=fps, seed=seed, background=background),
        conversion=VIDEO_CONVERSION.format(background=background),
        published_count=2_048,
        sampling=f"one clip a video, {frames} frames {steps}, from a random frame (seed {seed})",
    )
    videos = open_archives(path, kind) or _open_folder_or_array(
        path, kind, partial(_indices, frames=frames, stride=stride, seed=seed)
    )
    if fps is not None and isinstance(videos, (FrameFolders, ArrayVideos)):
        raise ValueError(
            f"{path} holds frames, which do not say their frames a second: leave fps out, or give files"
        )
    videos.frame_rates = _look_at_rates(videos) if fps is None else [fps]
    return FramesOfVideos(videos, frames) if frame_wise else videos


def _open_folder_or_array(
    path: Path, kind: SampleKind, indices: Callable[[str, int], list[int]]
) -> SampleSet:
    if path.is_dir():
        return FrameFolders(path, kind) if _holds_frame_folders(path) else Folder(path, kind)
    if (found := file_kind(path)) == "npy":
        return ArrayVideos(path, kind, indices)
    raise ValueError(
        f"{path} is neither a folder of videos nor an .npy file, zip or tar: {describe_kind(found)}"
    )


def _look_at_rates(videos: SampleSet) -> list[float]:
    """Return the frames per second of some videos of a set, each rate once; empty when not known."""
    step = max(1, len(videos.names) // RATES_LOOKED_AT)
    found = set()
    for name in videos.names[::step]:
        file = videos.file(name)
        with suppress(ValueError, OSError):  # named when the set is passed over
            if file is not None and (rate := open_video(require_regular(file)).fps) > 0:
                found.add(round(rate, 2))
    return sorted(found)


def rate_notes(real: list[float], generated: list[float]) -> list[str]:
    """Say when the videos of one or two sets show motion at different speeds: rates more than 1 % apart."""
    if not (real and generated) or max(real + generated) / min(real + generated) - 1 <= RATE_TOLERANCE:
        return []
    shown = [", ".join(f"{rate:g}" for rate in rates[:5]) for rates in (real, generated)]
    return [
        f"Real videos have {shown[0]} frames a second and generated ones {shown[1]}: motion of different "
        "speeds is compared. Take clips by time, with fps."
    ]


@dataclass
class ArrayVideos(SampleSet):
    """Videos of equal shape in an npy file, read one by one.

    Args:
        path: of the file: ``[N, F, H, W, C]``, ``[N, F, C, H, W]`` or ``[N, C, F, H, W]`` with C of 1 or 3;
            uint8, or floating-point numbers in [0, 1] or, when one is negative, in [-1, 1].
        kind: see :class:`~mhla_diffusion.evaluation.sets.samples.SampleKind`.
        indices: maps the name of a video and the number of its frames to those of its clip.

    Raises:
        ValueError: when the file cannot be read or holds something else.
    """

    path: Path
    indices: Callable[[str, int], list[int]]

    def __post_init__(self) -> None:
        try:
            with open(self.path, "rb") as file:
                read_npy_header(file)
            videos = np.load(self.path, mmap_mode="r")
        except (OSError, EOFError, ValueError, OverflowError) as error:
            raise ValueError(f"{self.path} is not a whole npy file ({error}): write it again") from error
        shape, dtype = videos.shape, videos.dtype
        axes = [axis for axis in (4, 2, 1) if len(shape) == 5 and shape[axis] in (1, 3)]
        if axes[:1] != [4] and len(axes) > 1:
            raise ValueError(f"{self.path} is {dtype} {list(shape)}: axes 1 and 2 may both be the channels")
        if not axes or 0 in shape or (dtype != np.uint8 and dtype.kind != "f"):
            raise ValueError(
                f"{self.path} is {dtype} {list(shape)}; uint8 [N, F, H, W, 1 or 3] with N > 0 is expected "
                "(pixels in [0, 255]), or floats in [0, 1] or [-1, 1], and channels at axis 1 or 2"
            )
        self.channels = axes[0]
        self.low = 0.0 if dtype == np.uint8 else self._find_range(videos)
        self.names = [f"[{index}]" for index in range(len(videos))]

    def _find_range(self, videos: NDArray[Any]) -> float:
        low, high = (float(find([find(video) for video in videos])) for find in (np.min, np.max))
        slack = 1e-2  # of half precision, and of a decoder that does not clip
        if not (low >= -1 - slack and high <= 1 + slack):
            raise ValueError(
                f"{self.path} has values from {low:g} to {high:g}; floating-point pixels must be in [0, 1] "
                "or [-1, 1]: scale them"
            )
        return -1.0 if low < -slack else 0.0

    def readers(self) -> Iterator[Callable[[], Pixels]]:
        for index, name in enumerate(self.names):
            yield partial(self._read, index, name)

    def _read(self, index: int, name: str) -> Pixels:
        # Mapped anew each time, as pages that were read count as memory of the process while they are mapped.
        video = np.moveaxis(np.load(self.path, mmap_mode="r")[index], self.channels - 1, -1)
        clip = video[self.indices(name, len(video))]
        if clip.dtype != np.uint8:
            scaled = (clip.astype(np.float64) - self.low) / (1 - self.low)
            clip = np.round(scaled.clip(0, 1) * 255).astype(np.uint8)
        return np.array(np.broadcast_to(clip, (*clip.shape[:3], 3)))


@dataclass
class FrameFolders(SampleSet):
    """Folders of frames as videos (StyleGAN-V): ``video/000000.jpg``, or ``class/video/000000.jpg``."""

    path: Path

    def __post_init__(self) -> None:
        found = find_files(self.path)
        folders = {name.rpartition("/")[0] for name in found if name.lower().endswith(FRAME_EXTENSIONS)}
        self.note_left_out(name for name in found if not name.lower().endswith(FRAME_EXTENSIONS))
        self.names = sorted(folders)
        if any("/" in name for name in self.names):
            self.label_by_subfolder()

    def readers(self) -> Iterator[Callable[[], Pixels]]:
        for name in self.names:
            yield partial(self.kind.read, self.path / name, **self.called(name))


def _holds_frame_folders(folder: Path) -> bool:
    """Check that below a folder there are pictures in subfolders and no videos."""
    found = find_files(folder)
    pictures = [name for name in found if name.lower().endswith(FRAME_EXTENSIONS)]
    return (
        bool(pictures)
        and all("/" in name for name in pictures)
        and not any(name.lower().endswith(VIDEO_EXTENSIONS) or name == MANIFEST for name in found)
    )


@dataclass
class FramesOfVideos(SampleSet):
    """Frames of a clip of each video, as images: ``name.mp4#0``, ``name.mp4#1``, ..."""

    path: Path | str = field(init=False)
    kind: SampleKind = field(init=False)
    videos: SampleSet
    frames: int

    def __post_init__(self) -> None:
        videos = self.videos
        self.kind = replace(
            image_kind(),
            conversion=videos.kind.conversion,
            sampling=f"every frame of {videos.kind.sampling}",
            published_count=videos.kind.published_count * self.frames,
        )
        self.group = self.frames
        self.path, self.class_names = videos.path, videos.class_names
        self.ids_by_position = videos.ids_by_position
        self.manifest, self.unlisted = videos.manifest, videos.unlisted
        self.left_out, self.notes = videos.left_out, videos.notes
        self.frame_rates = videos.frame_rates
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


def read_clip(
    path: Path,
    *,
    frames: int,
    stride: int = 1,
    fps: float | None = None,
    seed: int,
    background: str = WHITE,
    called: str | None = None,
) -> Pixels:
    """Read one clip of a video, uint8 ``[F, H, W, 3]``; ``called`` or its name says where it begins.

    Raises:
        UnreadableVideoError: when it cannot be decoded, is too short, or has fewer frames a second.
    """
    reader = open_video(path, background=background)
    start = _start(called or path.name, seed)
    return reader.read(choose_clip(reader, length=frames, stride=stride, fps=fps, start=start))


def _indices(name: str, num_frames: int, *, frames: int, stride: int, seed: int) -> list[int]:
    """Choose the frames of a clip of an array."""
    return clip_indices(num_frames, length=frames, stride=stride, start=_start(name, seed))


def _start(name: str, seed: int) -> float:
    """Draw where a clip begins, 0 to 1."""
    # As bytes, since not every name is text.
    return random.Random(f"{seed} {name}".encode("utf-8", "surrogateescape")).random()
