"""From two sets of images to their scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .compare import BOOTSTRAP, CompareSettings, compare
from .measure import PassSettings, measure
from .networks.extractor import FeatureExtractor, load_extractors
from .networks.images import load_extractor
from .pages.report import Report
from .scores.frechet import FeatureStatistics
from .sets.images import open_images


def evaluate_images(
    real: str | Path,
    generated: str | Path,
    *,
    metrics: str | Sequence[str] = "auto",
    extractor: str | FeatureExtractor | Sequence[str | FeatureExtractor] = "auto",
    weights: str | Path | None = None,
    bootstrap: int = BOOTSTRAP,
    seed: int = 0,
    max_skipped: float = 0.01,
    cache: str | Path | None = None,
    batch_size: int = 16,
    num_workers: int | None = None,
    device: str | None = None,
    trust_statistics: bool = False,
) -> Report:
    """Score generated images against real ones.

    Each image is read once, and goes through each extractor once. Features are kept in a temporary folder
    (TMPDIR says where), so that memory does not depend on the number of images. Under ``accelerate launch``
    the processes share the work; with equally many threads in each, scores are those of one process.

    Args:
        real: folder of images, npz of images (ADM layout), or npz of statistics (``mu`` and ``sigma``).
        generated: folder of images, with the manifest.json of scripts/generate.py or without, or npz.
        metrics: out of ``frechet``, ``sfid``, ``inception_score``, ``kid``, ``precision``, ``recall``,
            ``density``, ``coverage``, ``frechet_per_class`` and ``clip_score``; ``auto`` are all that the
            extractors and the sets allow.
        extractor: ``auto``, ``inception`` (clean-fid's), ``inception_adm``, ``dinov2``, ``clip`` or
            ``efficientnet_lite0`` (see ``load_extractor``), an own one, or several.
        weights: of the extractor; of several extractors each as ``"name=weights"``.
        bootstrap: replicates of the bootstrap over samples that intervals come from; 0 for none.
        seed: of the bootstrap.
        max_skipped: files that cannot be read are skipped, named and counted up to this share of a set; more
            are an error.
        cache: folder in which features are kept for later runs, and from which a run that was stopped goes
            on. Files are known by their content.
        batch_size: images in one forward pass; changes the score by rounding only.
        num_workers: threads that decode and resize; one per CPU core, at most 8, by default.
        device: torch device; a GPU when there is one, by default.
        trust_statistics: accept statistics that do not state their extractor. The score is then flagged.

    Returns:
        The scores with everything that has to be known to compare them; ``save`` writes it to a folder.

    Raises:
        ValueError: when a set is missing, empty or unreadable, something that a score needs is missing,
            statistics are of another extractor, or features are not finite.
        ImportError: when the ``eval`` extra is not installed.
    """
    return compare(
        real,
        generated,
        open_set=open_images,
        load_extractors=partial(load_extractors, extractor, load_extractor, weights=weights, device=device),
        settings=CompareSettings(
            metrics=metrics,
            bootstrap=bootstrap,
            seed=seed,
            trust_statistics=trust_statistics,
            passing=PassSettings(batch_size, num_workers, max_skipped, cache),
        ),
    )


def compute_statistics(
    images: str | Path,
    *,
    extractor: str | FeatureExtractor = "auto",
    weights: str | Path | None = None,
    max_skipped: float = 0.01,
    cache: str | Path | None = None,
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
    settings = PassSettings(batch_size, num_workers, max_skipped, cache)
    image_set = open_images(images)
    loaded = load_extractor(extractor, weights=weights, device=device)
    return measure(image_set, [loaded], settings, title="images").measured[loaded.name].statistics
