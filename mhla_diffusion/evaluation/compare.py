"""From two sets to a report: which scores, how they are computed, and what has to be said beside them."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .measure import Pass, PassSettings, measure
from .networks.extractor import FeatureExtractor
from .pages.pictures import show
from .pages.report import Report
from .scores.frechet import FeatureStatistics
from .scores.metrics import METRICS, Comparison, Measured, choose_metrics
from .scores.neighbours import Neighbourhoods
from .scores.score import Score
from .sets.samples import (
    SampleKind,
    SampleSet,
    SetSummary,
    common_classes,
    holds_samples,
    holds_statistics,
)

logger = logging.getLogger(__name__)

# Below this the bias of a Frechet distance is of the size of the differences people report.
MIN_SAMPLES = 2048

BOOTSTRAP = 20


@dataclass(frozen=True)
class CompareSettings:
    """What ``evaluate_images`` and ``evaluate_videos`` have in common; see there."""

    metrics: str | Sequence[str] = "auto"
    bootstrap: int = BOOTSTRAP
    seed: int = 0
    trust_statistics: bool = False
    passing: PassSettings = field(default_factory=PassSettings)

    def __post_init__(self) -> None:
        if self.bootstrap != 0 and self.bootstrap < 2:
            raise ValueError(f"bootstrap must be 0 (no intervals) or at least 2, got {self.bootstrap}")


def compare(
    real: str | Path,
    generated: str | Path,
    *,
    open_set: Callable[[str | Path], SampleSet],
    load_extractors: Callable[[], Sequence[FeatureExtractor]],
    settings: CompareSettings,
) -> Report:
    """Score one set against another, the real one perhaps as statistics; see ``evaluate_images``.

    Args:
        open_set: finds the samples at a path.
        load_extractors: called once both are known to be there.
        settings: see :class:`CompareSettings`.
    """
    PartialState()  # before a device is chosen
    real_set = open_set(real) if holds_samples(real) else None
    generated_set = open_set(generated)
    kind, extractors = generated_set.kind, load_extractors()
    known, flags = None, list[str]()
    if holds_statistics(real):
        known, flags = _known(Path(real), kind, extractors, trust=settings.trust_statistics)
    classes = common_classes(real_set, generated_set)
    chosen = choose_metrics(
        settings.metrics,
        extractors,
        real_samples=real_set is not None,
        spatial_statistics=known is None or known.spatial is not None,
        classes=classes is not None,
        prompts=bool(generated_set.prompts),
        smallest=min(len(samples.names) for samples in (real_set, generated_set) if samples is not None),
    )
    report = None
    with tempfile.TemporaryDirectory() as scratch:
        pass_over = partial(measure, extractors=extractors, settings=settings.passing, scratch=Path(scratch))
        first = None if real_set is None else pass_over(real_set, title="real")
        first = first if known is None else _given(Path(real), known, extractors[0], first)
        second = pass_over(generated_set, title="generated")
        if PartialState().is_main_process:
            assert first is not None
            flags += _sample_flags(kind, max(e.dimension for e in extractors), first, second)
            scores, found = _scores(first, second, classes, chosen, settings, flags)
            pictures, neighbours = show(real_set, generated_set, first, second, found)
            report = Report(
                scores=scores,
                real=first.summary,
                generated=replace(second.summary, copies=len(set(second.digests) & set(first.digests))),
                protocol=_protocol(kind, extractors, settings, [name for name, _ in chosen]),
                real_statistics=first.measured[extractors[0].name].statistics,
                kind=kind.name,
                pictures=pictures,
                neighbours=neighbours,
            )
    # Every process returns the report of the first.
    (report,) = broadcast_object_list([report])
    return report


def _scores(
    real: Pass,
    generated: Pass,
    classes: tuple[list[str], list[str]] | None,
    chosen: Sequence[tuple[str, FeatureExtractor]],
    settings: CompareSettings,
    flags: list[str],
) -> tuple[list[Score], Neighbourhoods | None]:
    """All scores, and the neighbourhoods when scores needed them."""
    scores, neighbourhoods = [], None
    for extractor in {extractor.name: extractor for _, extractor in chosen}.values():
        sets = Comparison(
            extractor=extractor,
            real=_labelled(real, extractor, classes and classes[0]),
            generated=_labelled(generated, extractor, classes and classes[1]),
            replicates=settings.bootstrap,
            seed=settings.seed,
        )
        cautions = flags + ([extractor.caution] if extractor.caution else [])
        for name, its in chosen:
            if its is extractor:
                score = METRICS[name].compute(sets, name)
                scores.append(replace(score, flags=[*score.flags, *cautions]))
                logger.info("%s", scores[-1])
        # A cached property is there once a score has asked for it.
        neighbourhoods = neighbourhoods or sets.__dict__.get("neighbourhoods")
    return scores, neighbourhoods


def _labelled(found: Pass, extractor: FeatureExtractor, classes: list[str] | None) -> Measured:
    measured = found.measured[extractor.name]
    return measured if classes is None else replace(measured, labels=[classes[i] for i in found.indices])


def _known(
    path: Path, kind: SampleKind, extractors: Sequence[FeatureExtractor], *, trust: bool
) -> tuple[FeatureStatistics, list[str]]:
    """Statistics from a file, refused unless they are of this extractor and the same frames of videos."""
    if len(extractors) > 1:
        raise ValueError(f"{path} has the statistics of one extractor: ask for that one, or give the samples")
    extractor = extractors[0]
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
    return statistics, flags


def _given(path: Path, known: FeatureStatistics, extractor: FeatureExtractor, found: Pass | None) -> Pass:
    """Statistics in the place of a set that was passed over, or of its own statistics."""
    if found is None:
        return Pass({extractor.name: Measured(known)}, SetSummary(str(path), known.count, known.fingerprint))
    measured = {
        name: replace(measured, statistics=known, own_statistics=False)
        for name, measured in found.measured.items()
    }
    return replace(found, measured=measured)


def _sample_flags(kind: SampleKind, dimension: int, real: Pass, generated: Pass) -> list[str]:
    """What has to be said when a set is too small for its covariance, or its size not known."""
    needed = max(MIN_SAMPLES, dimension + 1)
    flags = []
    for title, count in (("real", real.summary.count), ("generated", generated.summary.count)):
        if count is None:
            flags.append(f"The number of {title} {kind.name}s is not stated in their statistics.")
        elif count < needed:
            flags.append(
                f"Only {count:,} {title} {kind.name}s for {dimension}-dimensional features: Frechet "
                f"distances are biased upwards. Use at least {needed:,}; papers use {kind.published_count:,}."
            )
    return flags


def _protocol(
    kind: SampleKind,
    extractors: Sequence[FeatureExtractor],
    settings: CompareSettings,
    metrics: Sequence[str],
) -> dict[str, Any]:
    """Everything besides the samples that a score depends on."""
    packages = [package for extractor in extractors for package in extractor.packages]
    return {
        "extractors": {extractor.name: _describe(extractor) for extractor in extractors},
        "scores": {name: METRICS[name].definition for name in dict.fromkeys(metrics)},
        "intervals": f"95 %: 1.96 standard deviations of {settings.bootstrap} bootstrap replicates over "
        f"samples (seed {settings.seed}) on either side"
        if settings.bootstrap
        else "none",
        "conversion": kind.conversion,
        **({"clips": kind.sampling} if kind.sampling else {}),
        "fingerprint": f"sha256 over shape and RGB pixels of the scored {kind.name}s, in reading order",
        "batch_size": settings.passing.batch_size,
        "device": extractors[0].device,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": sys.version.split()[0], **_versions(packages)},
    }


def _describe(extractor: FeatureExtractor) -> dict[str, Any]:
    return {
        "feature_dimension": extractor.dimension,
        "weights": extractor.weights,
        "weights_sha256": extractor.weights_sha256,
        "resize": extractor.resize,
        "normalization": extractor.normalization,
        "statistics": f"mean and covariance in float64, divided by N{' - 1' if extractor.ddof else ''}",
    }


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in ("mhla-diffusion", "torch", "numpy", "scipy", "pillow", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a source tree that is not installed
            found[package] = "unknown"
    return found
