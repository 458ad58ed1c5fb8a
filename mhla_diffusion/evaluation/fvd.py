"""From two sets of videos to their scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .compare import BOOTSTRAP, CompareSettings, compare
from .measure import PassSettings
from .networks.extractor import FeatureExtractor, load_extractors
from .networks.images import load_extractor
from .networks.videos import load_video_extractor
from .pages.report import Report
from .sets.videos import open_videos


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
        real: folder of videos, npy of videos uint8 ``[N, F, H, W, 3]``, or npz of statistics that an earlier
            call saved.
        generated: folder of videos, with the manifest.json of scripts/generate.py or without, or npy.
        frames: of a clip; StyleGAN-V's protocol takes 16.
        stride: frames of the video from one of the clip to the next.
        frame_wise: score the frames of the clips as images, with an extractor of images: frame-wise FID.
        metrics: out of ``frechet``, ``kid``, ``precision``, ``recall``, ``density``, ``coverage`` and
            ``frechet_per_class``; ``auto`` are all that the sets allow.
        extractor: ``auto``, ``i3d``, ``cdfvd_i3d``, ``cdfvd_videomae``, ``videomae`` or ``transnetv2`` (see
            ``load_video_extractor``), an own one, or several; of images (see ``load_extractor``) when
            ``frame_wise``.
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
            trust_statistics=trust_statistics,
            passing=PassSettings(batch_size, num_workers, max_skipped, cache),
        ),
    )
