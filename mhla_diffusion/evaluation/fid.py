"""From two sets of images to their Frechet distance."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .features import FeatureExtractor, load_extractor
from .files import open_images
from .frechet import FeatureStatistics
from .measure import compare, measure
from .report import Report


def evaluate_images(
    real: str | Path,
    generated: str | Path,
    *,
    extractor: str | FeatureExtractor = "auto",
    weights: str | Path | None = None,
    batch_size: int = 16,
    num_workers: int | None = None,
    device: str | None = None,
    trust_statistics: bool = False,
) -> Report:
    """Score generated images against real ones by the Frechet distance of their features.

    Files that cannot be read are skipped, named and counted. Memory does not depend on the number of images.

    Args:
        real: folder of images, npz of images (ADM layout), or npz of statistics (``mu`` and ``sigma``).
        generated: folder of images, with the manifest.json of scripts/generate.py or without, or npz.
        extractor: ``auto``, ``inception`` or ``efficientnet_lite0`` (see ``load_extractor``), or an own one.
        weights: file of Inception weights.
        batch_size: images in one forward pass; changes the score by rounding only.
        num_workers: threads that decode and resize; one per CPU core, at most 8, by default.
        device: torch device; a GPU when there is one, by default.
        trust_statistics: accept statistics that do not state their extractor. The score is then flagged.

    Returns:
        The score with everything that has to be known to compare it; ``save`` writes it to a folder.

    Raises:
        ValueError: when a set is missing, empty or unreadable, statistics are of another extractor, or
            features are not finite.
        ImportError: when the ``eval`` extra is not installed.
    """
    return compare(
        real,
        generated,
        open_set=open_images,
        load_extractor=partial(load_extractor, extractor, weights=weights, device=device),
        batch_size=batch_size,
        num_workers=num_workers,
        trust_statistics=trust_statistics,
    )


def compute_statistics(
    images: str | Path,
    *,
    extractor: str | FeatureExtractor = "auto",
    weights: str | Path | None = None,
    batch_size: int = 16,
    num_workers: int | None = None,
    device: str | None = None,
) -> FeatureStatistics:
    """Mean and covariance of the features of a set of images; arguments as for ``evaluate_images``.

    ``compute_statistics(...).save("cifar10.npz")`` gives a file to pass as ``real`` from then on.

    Raises:
        ValueError: when the set is missing, empty or unreadable, or features are not finite.
        ImportError: when the ``eval`` extra is not installed.
    """
    image_set = open_images(images)
    measured = measure(
        image_set,
        extractor=load_extractor(extractor, weights=weights, device=device),
        batch_size=batch_size,
        num_workers=num_workers,
        show=set(),
        title="images",
    )
    return measured.statistics
