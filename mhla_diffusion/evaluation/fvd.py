"""From two sets of videos to their Frechet distance."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

from ..video_files import clip_indices, open_video
from .features import FeatureExtractor
from .files import Folder, Pixels, SampleKind, SampleSet
from .measure import compare
from .report import Report
from .video_features import load_video_extractor

EXTENSIONS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v")


def evaluate_videos(
    real: str | Path,
    generated: str | Path,
    *,
    frames: int = 16,
    stride: int = 1,
    seed: int = 0,
    extractor: str | FeatureExtractor = "auto",
    weights: str | Path | None = None,
    batch_size: int = 8,
    num_workers: int | None = None,
    device: str | None = None,
    trust_statistics: bool = False,
) -> Report:
    """Score generated videos against real ones by the Frechet distance of features of one clip of each.

    The clip begins at a random frame, which depends on ``seed`` and the name of the file alone. Videos that
    cannot be read, or are too short, are skipped, named and counted. Memory does not depend on the number of
    videos. Generated videos should come with as many frames per second as the real ones.

    Args:
        real: folder of videos, or npz of statistics that an earlier call saved.
        generated: folder of videos, with the manifest.json of scripts/generate.py or without.
        frames: of a clip; StyleGAN-V's protocol takes 16.
        stride: frames of the video from one of the clip to the next.
        seed: of the clips' beginnings.
        extractor: ``auto``, ``i3d``, ``videomae`` or ``transnetv2`` (see ``load_video_extractor``), or an own
            one.
        weights: of I3D or VideoMAE.
        batch_size: clips in one forward pass; changes the score by rounding only.
        num_workers: threads that decode and resize; one per CPU core, at most 8, by default.
        device: torch device; a GPU when there is one, by default.
        trust_statistics: accept statistics that do not state their extractor. The score is then flagged.

    Returns:
        The score with everything that has to be known to compare it; ``save`` writes it to a folder.

    Raises:
        ValueError: when a set is missing, empty or unreadable, statistics are of another extractor or other
            clips, or features are not finite.
        ImportError: when the ``eval`` extra is not installed.
    """
    return compare(
        real,
        generated,
        open_set=partial(open_videos, frames=frames, stride=stride, seed=seed),
        load_extractor=partial(
            load_video_extractor, extractor, weights=weights, frames=frames, device=device
        ),
        batch_size=batch_size,
        num_workers=num_workers,
        trust_statistics=trust_statistics,
    )


def open_videos(path: str | Path, *, frames: int = 16, stride: int = 1, seed: int = 0) -> SampleSet:
    """The videos in a folder, a clip of each; none is decoded yet.

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
    return Folder(Path(path), kind)


def read_clip(path: Path, *, frames: int, stride: int, seed: int) -> Pixels:
    """One clip of a video, uint8 ``[F, H, W, 3]``.

    Raises:
        UnreadableVideoError: when it cannot be decoded or is too short.
    """
    reader = open_video(path)
    start = random.Random(f"{seed} {path.name}").random()
    return reader.read(clip_indices(reader.num_frames, length=frames, step=stride, start=start))
