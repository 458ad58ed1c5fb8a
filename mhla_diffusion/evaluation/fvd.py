"""From two sets of videos to their scores."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ..video_files import clip_indices, open_video
from .compare import BOOTSTRAP, CompareSettings, compare
from .features import FeatureExtractor, load_extractor, load_extractors
from .files import IMAGES, Folder, Pixels, SampleKind, SampleSet
from .report import Report
from .video_features import load_video_extractor

EXTENSIONS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v")


def evaluate_videos(
    real: str | Path,
    generated: str | Path,
    *,
    frames: int = 16,
    stride: int = 1,
    frame_wise: bool = False,
    metrics: str | Sequence[str] = "auto",
    extractor: str | FeatureExtractor | Sequence[str | FeatureExtractor] = "auto",
    weights: str | Path | None = None,
    bootstrap: int = BOOTSTRAP,
    seed: int = 0,
    max_skipped: float = 0.01,
    cache: str | Path | None = None,
    batch_size: int = 8,
    num_workers: int | None = None,
    device: str | None = None,
    trust_statistics: bool = False,
) -> Report:
    """Score generated videos against real ones by the features of one clip of each.

    The clip begins at a random frame, which depends on ``seed`` and the name of the file alone. Memory does
    not depend on the number of videos. Generated videos should come with as many frames per second as the
    real ones.

    Args:
        real: folder of videos, or npz of statistics that an earlier call saved.
        generated: folder of videos, with the manifest.json of scripts/generate.py or without.
        frames: of a clip; StyleGAN-V's protocol takes 16.
        stride: frames of the video from one of the clip to the next.
        frame_wise: score the frames of the clips as images, with an extractor of images: frame-wise FID.
        metrics: out of ``frechet``, ``kid``, ``precision``, ``recall``, ``density``, ``coverage`` and
            ``frechet_per_class``; ``auto`` are all that the sets allow.
        extractor: ``auto``, ``i3d``, ``videomae`` or ``transnetv2`` (see ``load_video_extractor``), an own
            one, or several; of images (see ``load_extractor``) when ``frame_wise``.
        weights: of the extractor; of several extractors each as ``"name=weights"``.
        bootstrap: replicates of the bootstrap over videos that intervals come from; 0 for none.
        seed: of the clips' beginnings and of the bootstrap.
        max_skipped: videos that cannot be read or are too short are skipped, named and counted up to this
            share of a set; more are an error.
        cache: folder in which features are kept for later runs; see ``evaluate_images``.
        batch_size: clips in one forward pass; changes the score by rounding only.
        num_workers: threads that decode and resize; one per CPU core, at most 8, by default.
        device: torch device; a GPU when there is one, by default.
        trust_statistics: accept statistics that do not state their extractor. The score is then flagged.

    Returns:
        The scores with everything that has to be known to compare them; ``save`` writes it to a folder.

    Raises:
        ValueError: when a set is missing, empty or unreadable, statistics are of another extractor or other
            clips, or features are not finite.
        ImportError: when the ``eval`` extra is not installed.
    """
    load = load_extractor if frame_wise else partial(load_video_extractor, frames=frames)
    return compare(
        real,
        generated,
        open_set=partial(open_videos, frames=frames, stride=stride, seed=seed, frame_wise=frame_wise),
        load_extractors=partial(load_extractors, extractor, load, weights=weights, device=device),
        settings=CompareSettings(
            metrics=metrics,
            bootstrap=bootstrap,
            seed=seed,
            batch_size=batch_size,
            num_workers=num_workers,
            max_skipped=max_skipped,
            cache=cache,
            trust_statistics=trust_statistics,
        ),
    )


def open_videos(
    path: str | Path, *, frames: int = 16, stride: int = 1, seed: int = 0, frame_wise: bool = False
) -> SampleSet:
    """The videos in a folder, a clip of each, or when ``frame_wise`` its frames; none is decoded yet.

    Raises:
        ValueError: when there is no folder at ``path``, no video in it, or a clip has no frames.
    """
    if frames < 1 or stride < 1:
        raise ValueError(f"frames and stride must be at least 1, got {frames} and {stride}")
    if not Path(path).is_dir():
        raise ValueError(f"{path} is not a folder of videos")
    kind = SampleKind(
        name="video",
        extensions=EXTENSIONS,
        read=partial(read_clip, frames=frames, stride=stride, seed=seed),
        conversion="RGB, 8 bits, as the decoder gives it; grayscale repeated",
        published_count=2_048,
        sampling=f"one clip a video, {frames} frames with stride {stride}, from a random frame (seed {seed})",
    )
    videos = Folder(Path(path), kind)
    return FramesOfVideos(videos, frames) if frame_wise else videos


@dataclass
class FramesOfVideos:
    """The frames of a clip of each video, as images: ``name.mp4#0``, ``name.mp4#1``, ..."""

    videos: Folder
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
    """A clip that several threads want frames of."""

    def __init__(self, read: Callable[[], Pixels]) -> None:
        self.read, self.lock = read, threading.Lock()
        self.clip: Pixels | None = None

    def frame(self, index: int) -> Pixels:
        with self.lock:
            if self.clip is None:
                self.clip = self.read()
        return self.clip[index]


def read_clip(path: Path, *, frames: int, stride: int, seed: int) -> Pixels:
    """One clip of a video, uint8 ``[F, H, W, 3]``.

    Raises:
        UnreadableVideoError: when it cannot be decoded or is too short.
    """
    reader = open_video(path)
    start = random.Random(f"{seed} {path.name}").random()
    return reader.read(clip_indices(reader.num_frames, length=frames, step=stride, start=start))
