"""One pass over a set of images or clips: features, their statistics, and what belongs into a report."""

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
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from .features import FeatureExtractor
from .files import Pixels, SampleKind, SampleSet, holds_statistics
from .frechet import FeatureStatistics, RunningStatistics, frechet_distance
from .grid import Picture, choose_rows, make_picture
from .report import PictureRow, Report, Score, SetSummary, SkippedFile

logger = logging.getLogger(__name__)

# Below this the bias of the distance is of the size of the differences people report.
MIN_SAMPLES = 2048


@dataclass(frozen=True)
class Measured:
    """What one pass over a set found: ``pictures`` by the index of the sample."""

    statistics: FeatureStatistics
    summary: SetSummary
    pictures: dict[int, Picture]


def compare(
    real: str | Path,
    generated: str | Path,
    *,
    open_set: Callable[[str | Path], SampleSet],
    load_extractor: Callable[[], FeatureExtractor],
    batch_size: int,
    num_workers: int | None,
    trust_statistics: bool,
) -> Report:
    """The Frechet distance between two sets, the real one perhaps as statistics; see ``evaluate_images``.

    Args:
        open_set: finds the samples at a path.
        load_extractor: called once both are known to be there.
    """
    real_set = None if holds_statistics(real) else open_set(real)
    generated_set = open_set(generated)
    kind, extractor = generated_set.kind, load_extractor()
    rows = choose_rows(real_set, generated_set)
    measured = partial(measure, extractor=extractor, batch_size=batch_size, num_workers=num_workers)
    if real_set is None:
        first, flags = _known(Path(real), kind, extractor, trust=trust_statistics)
    else:
        first, flags = measured(real_set, show={i for row in rows for i in row.real}, title="real"), []
    second = measured(generated_set, show={i for row in rows for i in row.generated}, title="generated")

    a, b = first.statistics, second.statistics
    flags += _sample_flags(kind, extractor, real=a.count, generated=b.count)
    flags += [extractor.caution] if extractor.caution else []
    score = Score(extractor.score_name, frechet_distance(a.mu, a.sigma, b.mu, b.sigma), flags)
    logger.info("%s", score)
    return Report(
        scores=[score],
        real=first.summary,
        generated=second.summary,
        protocol=_protocol(kind, extractor, batch_size),
        pictures=[
            PictureRow(
                row.label,
                real=[first.pictures[i] for i in row.real if i in first.pictures],
                generated=[second.pictures[i] for i in row.generated if i in second.pictures],
            )
            for row in rows
        ],
        real_statistics=a,
        kind=kind.name,
    )


@dataclass(frozen=True)
class _Loaded:
    """One sample made ready in a worker thread, or why it could not be."""

    name: str
    prepared: NDArray[Any] | None = None
    digest: bytes = b""
    picture: Picture | None = None
    error: str | None = None


def measure(
    samples: SampleSet,
    *,
    extractor: FeatureExtractor,
    batch_size: int,
    num_workers: int | None,
    show: set[int],
    title: str,
) -> Measured:
    """One pass over a set: statistics, what was skipped, and pictures of the samples at the indices ``show``.

    Raises:
        ValueError: when fewer than two can be read, or features are not finite.
    """
    running = RunningStatistics(extractor.dimension, ddof=extractor.ddof)
    fingerprint = hashlib.sha256()
    skipped: list[SkippedFile] = []
    pictures: dict[int, Picture] = {}
    index = 0
    with tqdm(total=len(samples.names), desc=title, unit=samples.kind.name) as progress:
        for batch in _batches(samples, extractor, show, batch_size=batch_size, num_workers=num_workers):
            for loaded in batch:
                if loaded.error is not None:
                    logger.warning("%s: skipped %s: %s", title, loaded.name, loaded.error)
                    skipped.append(SkippedFile(loaded.name, loaded.error))
                if loaded.picture is not None:
                    pictures[index] = loaded.picture
                fingerprint.update(loaded.digest)
                index += 1
            prepared = [loaded.prepared for loaded in batch if loaded.prepared is not None]
            for _, equal in groupby(prepared, key=np.shape):
                running.update(extractor(np.stack(list(equal))))
            progress.update(len(batch))
    if running.count < 2:
        cause = f" (the first that is not, {skipped[0].file}: {skipped[0].reason})" if skipped else ""
        raise ValueError(
            f"{samples.path} has {running.count} readable {samples.kind.name}(s) of "
            f"{len(samples.names)}{cause}; a covariance needs at least 2"
        )
    statistics = FeatureStatistics(
        running.mean,
        running.covariance,
        count=running.count,
        extractor=extractor.name,
        weights_sha256=extractor.weights_sha256,
        fingerprint=fingerprint.hexdigest(),
        sampling=samples.kind.sampling,
    )
    summary = SetSummary(
        source=str(samples.path),
        count=running.count,
        fingerprint=statistics.fingerprint,
        skipped=skipped,
        unlisted=samples.unlisted,
        manifest=samples.manifest,
    )
    return Measured(statistics, summary, pictures)


def _batches(
    samples: SampleSet,
    extractor: FeatureExtractor,
    show: set[int],
    *,
    batch_size: int,
    num_workers: int | None,
) -> Iterator[list[_Loaded]]:
    """Batches in the order of the set; threads prepare the next one while one is used."""
    readers = enumerate(zip(samples.names, samples.readers(), strict=True))
    pending: deque[list[Any]] = deque()
    # Pillow, decord and hashlib release the interpreter lock, so threads use all cores and copy nothing.
    with ThreadPoolExecutor(num_workers or min(os.cpu_count() or 1, 8)) as pool:
        while chunk := list(islice(readers, batch_size)):
            pending.append(
                [
                    pool.submit(_load, name, read, extractor, index in show, samples.prompts.get(name))
                    for index, (name, read) in chunk
                ]
            )
            if len(pending) > 1:
                yield [future.result() for future in pending.popleft()]
        for futures in pending:
            yield [future.result() for future in futures]


def _load(
    name: str, read: Callable[[], Pixels], extractor: FeatureExtractor, show: bool, prompt: str | None
) -> _Loaded:
    try:
        pixels = read()
    except ImportError:  # a decoder that is not installed is not the file's fault
        raise
    except Exception as error:  # on a broken file Pillow's plugins raise whatever they stumble over
        return _Loaded(name, error=f"{type(error).__name__}: {error}")
    return _Loaded(
        name,
        prepared=extractor.prepare(pixels),
        digest=hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).digest(),
        picture=make_picture(pixels, name, prompt) if show else None,
    )


def _known(
    path: Path, kind: SampleKind, extractor: FeatureExtractor, *, trust: bool
) -> tuple[Measured, list[str]]:
    """Statistics from a file, refused unless they are of this extractor and the same frames of videos."""
    statistics = FeatureStatistics.load(path)
    flags = []
    if len(statistics.mu) != extractor.dimension:
        raise ValueError(
            f"{path} has statistics of {len(statistics.mu)} dimensions, the extractor {extractor.name} gives "
            f"{extractor.dimension}: choose the extractor they were made with, or give the {kind.name}s"
        )
    if statistics.extractor is None and not trust:
        raise ValueError(
            f"{path} does not state its extractor, so nothing shows that it was {extractor.name}: give the "
            f"{kind.name}s, or set trust_statistics if you know it"
        )
    if statistics.extractor is None:
        flags.append(f"{path.name} does not state its extractor; it was taken to be {extractor.name}.")
    stated = (statistics.extractor or extractor.name, statistics.weights_sha256 or extractor.weights_sha256)
    if stated != (extractor.name, extractor.weights_sha256):
        raise ValueError(
            f"{path} was made with the extractor {stated[0]} (weights sha256 {stated[1]}), not with "
            f"{extractor.name} ({extractor.weights_sha256}): use that one, or give the {kind.name}s"
        )
    if statistics.extractor is not None and statistics.sampling != kind.sampling:
        raise ValueError(
            f"{path} is of {statistics.sampling or 'images'}, not of {kind.sampling or 'images'}: sample the "
            f"generated ones in the same way, or give the {kind.name}s"
        )
    summary = SetSummary(str(path), statistics.count, statistics.fingerprint)
    return Measured(statistics, summary, {}), flags


def _sample_flags(kind: SampleKind, extractor: FeatureExtractor, **counts: int | None) -> list[str]:
    """What has to be said when a set is too small for its covariance, or its size not known."""
    needed = max(MIN_SAMPLES, extractor.dimension + 1)
    flags = []
    for title, count in counts.items():
        if count is None:
            flags.append(f"The number of {title} {kind.name}s is not stated in their statistics.")
        elif count < needed:
            flags.append(
                f"Only {count:,} {title} {kind.name}s for {extractor.dimension}-dimensional features: the "
                f"distance is biased upwards. Use at least {needed:,}; papers use {kind.published_count:,}."
            )
    return flags


def _protocol(kind: SampleKind, extractor: FeatureExtractor, batch_size: int) -> dict[str, Any]:
    """Everything besides the samples that a score depends on."""
    return {
        "extractor": extractor.name,
        "feature_dimension": extractor.dimension,
        "weights": extractor.weights,
        "weights_sha256": extractor.weights_sha256,
        "conversion": kind.conversion,
        **({"clips": kind.sampling} if kind.sampling else {}),
        "resize": extractor.resize,
        "normalization": extractor.normalization,
        "statistics": f"mean and covariance in float64, divided by N{' - 1' if extractor.ddof else ''}",
        "fingerprint": f"sha256 over shape and RGB pixels of the scored {kind.name}s, in reading order",
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
