"""From two sets of images to their Frechet distance."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from .features import FeatureExtractor, load_extractor
from .files import CONVERSION, ImageSet, Pixels, holds_statistics, open_images
from .frechet import FeatureStatistics, RunningStatistics, frechet_distance
from .grid import Picture, choose_rows, make_picture
from .report import ImageSetSummary, PictureRow, Report, Score, SkippedFile

logger = logging.getLogger(__name__)

# Below this the bias of the distance is of the size of the differences people report.
MIN_IMAGES = 2048


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
    real_images = None if holds_statistics(real) else open_images(real)
    generated_images = open_images(generated)
    if not isinstance(extractor, FeatureExtractor):
        extractor = load_extractor(extractor, weights=weights, device=device)
    rows = choose_rows(real_images, generated_images)
    measure = partial(_measure, extractor=extractor, batch_size=batch_size, num_workers=num_workers)
    if real_images is None:
        first, flags = _known(Path(real), extractor, trust=trust_statistics)
    else:
        first, flags = measure(real_images, show={i for row in rows for i in row.real}, title="real"), []
    second = measure(generated_images, show={i for row in rows for i in row.generated}, title="generated")

    a, b = first.statistics, second.statistics
    flags += _sample_flags(extractor, real=a.count, generated=b.count)
    flags += [extractor.caution] if extractor.caution else []
    score = Score(extractor.score_name, frechet_distance(a.mu, a.sigma, b.mu, b.sigma), flags)
    logger.info("%s", score)
    return Report(
        scores=[score],
        real=first.summary,
        generated=second.summary,
        protocol=_protocol(extractor, batch_size),
        pictures=[
            PictureRow(
                row.label,
                real=[first.pictures[i] for i in row.real if i in first.pictures],
                generated=[second.pictures[i] for i in row.generated if i in second.pictures],
            )
            for row in rows
        ],
        real_statistics=a,
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
    if not isinstance(extractor, FeatureExtractor):
        extractor = load_extractor(extractor, weights=weights, device=device)
    measured = _measure(
        image_set,
        extractor=extractor,
        batch_size=batch_size,
        num_workers=num_workers,
        show=set(),
        title="images",
    )
    return measured.statistics


@dataclass(frozen=True)
class _Measured:
    statistics: FeatureStatistics
    summary: ImageSetSummary
    pictures: dict[int, Picture]


@dataclass(frozen=True)
class _Loaded:
    """One image made ready in a worker thread, or why it could not be."""

    name: str
    resized: NDArray[np.float32] | None = None
    digest: bytes = b""
    picture: Picture | None = None
    error: str | None = None


def _measure(
    images: ImageSet,
    *,
    extractor: FeatureExtractor,
    batch_size: int,
    num_workers: int | None,
    show: set[int],
    title: str,
) -> _Measured:
    """One pass over a set: statistics, what was skipped, and the images at the indices ``show``."""
    running = RunningStatistics(extractor.dimension)
    fingerprint = hashlib.sha256()
    skipped: list[SkippedFile] = []
    pictures: dict[int, Picture] = {}
    index = 0
    with tqdm(total=len(images.names), desc=title, unit="image") as progress:
        for batch in _batches(images, extractor, show, batch_size=batch_size, num_workers=num_workers):
            for loaded in batch:
                if loaded.error is not None:
                    logger.warning("%s: skipped %s: %s", title, loaded.name, loaded.error)
                    skipped.append(SkippedFile(loaded.name, loaded.error))
                if loaded.picture is not None:
                    pictures[index] = loaded.picture
                fingerprint.update(loaded.digest)
                index += 1
            resized = [loaded.resized for loaded in batch if loaded.resized is not None]
            if resized:
                running.update(extractor(np.stack(resized)))
            progress.update(len(batch))
    if running.count < 2:
        cause = f" (the first that is not, {skipped[0].file}: {skipped[0].reason})" if skipped else ""
        raise ValueError(
            f"{images.path} has {running.count} readable image(s) of {len(images.names)}{cause}; a "
            "covariance needs at least 2"
        )
    statistics = FeatureStatistics(
        running.mean,
        running.covariance,
        count=running.count,
        extractor=extractor.name,
        weights_sha256=extractor.weights_sha256,
        fingerprint=fingerprint.hexdigest(),
    )
    summary = ImageSetSummary(
        source=str(images.path),
        count=running.count,
        fingerprint=statistics.fingerprint,
        skipped=skipped,
        unlisted=images.unlisted,
        manifest=images.manifest,
    )
    return _Measured(statistics, summary, pictures)


def _batches(
    images: ImageSet, extractor: FeatureExtractor, show: set[int], *, batch_size: int, num_workers: int | None
) -> Iterator[list[_Loaded]]:
    """Batches in the order of the set; threads prepare the next one while one is used."""
    readers = enumerate(zip(images.names, images.readers(), strict=True))
    pending: deque[list[Any]] = deque()
    # Pillow and hashlib release the interpreter lock, so threads use all cores and copy nothing.
    with ThreadPoolExecutor(num_workers or min(os.cpu_count() or 1, 8)) as pool:
        while chunk := list(islice(readers, batch_size)):
            pending.append(
                [pool.submit(_load, name, read, extractor, index in show) for index, (name, read) in chunk]
            )
            if len(pending) > 1:
                yield [future.result() for future in pending.popleft()]
        for futures in pending:
            yield [future.result() for future in futures]


def _load(name: str, read: Callable[[], Pixels], extractor: FeatureExtractor, show: bool) -> _Loaded:
    try:
        pixels = read()
    except Exception as error:  # on a broken file Pillow's plugins raise whatever they stumble over
        return _Loaded(name, error=f"{type(error).__name__}: {error}")
    return _Loaded(
        name,
        resized=extractor.resize(pixels),
        digest=hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).digest(),
        picture=make_picture(pixels, name) if show else None,
    )


def _known(path: Path, extractor: FeatureExtractor, *, trust: bool) -> tuple[_Measured, list[str]]:
    """Statistics from a file, refused unless they are of this extractor."""
    statistics = FeatureStatistics.load(path)
    flags = []
    if len(statistics.mu) != extractor.dimension:
        raise ValueError(
            f"{path} has statistics of {len(statistics.mu)} dimensions, the extractor {extractor.name} gives "
            f"{extractor.dimension}: choose the extractor they were made with, or give the images"
        )
    if statistics.extractor is None and not trust:
        raise ValueError(
            f"{path} does not state its extractor, so nothing shows that it was {extractor.name}: give the "
            "images, or set trust_statistics if you know it"
        )
    if statistics.extractor is None:
        flags.append(f"{path.name} does not state its extractor; it was taken to be {extractor.name}.")
    stated = (statistics.extractor or extractor.name, statistics.weights_sha256 or extractor.weights_sha256)
    if stated != (extractor.name, extractor.weights_sha256):
        raise ValueError(
            f"{path} was made with the extractor {stated[0]} (weights sha256 {stated[1]}), not with "
            f"{extractor.name} ({extractor.weights_sha256}): use that one, or give the images"
        )
    summary = ImageSetSummary(str(path), statistics.count, statistics.fingerprint)
    return _Measured(statistics, summary, {}), flags


def _sample_flags(extractor: FeatureExtractor, **counts: int | None) -> list[str]:
    """What has to be said when a set is too small for its covariance, or its size not known."""
    needed = max(MIN_IMAGES, extractor.dimension + 1)
    flags = []
    for title, count in counts.items():
        if count is None:
            flags.append(f"The number of {title} images is not stated in their statistics.")
        elif count < needed:
            flags.append(
                f"Only {count:,} {title} images for {extractor.dimension}-dimensional features: the "
                f"distance is biased upwards. Use at least {needed:,}; papers use 50,000."
            )
    return flags


def _protocol(extractor: FeatureExtractor, batch_size: int) -> dict[str, Any]:
    """Everything besides the images that a score depends on."""
    return {
        "extractor": extractor.name,
        "feature_dimension": extractor.dimension,
        "weights": extractor.weights,
        "weights_sha256": extractor.weights_sha256,
        "conversion": CONVERSION,
        "resize": extractor.resize_description,
        "normalization": extractor.normalization,
        "statistics": "mean and covariance in float64, divided by N - 1",
        "fingerprint": "sha256 over shape and RGB pixels of the scored images, in reading order",
        "batch_size": batch_size,
        "device": extractor.device,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": sys.version.split()[0], **_versions(extractor.packages)},
    }


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in ("mhla-diffusion", "torch", "numpy", "scipy", "pillow", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a source tree that is not installed
            found[package] = "unknown"
    return found
