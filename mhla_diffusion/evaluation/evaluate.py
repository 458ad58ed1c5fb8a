"""From two sets of images or of videos to their scores."""

from __future__ import annotations

import hashlib
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..arguments import require_seed
from ..files.pictures import WHITE
from ..optional import require
from ..processes import in_first_process, one_fate, process_state
from .measure import Pass, PassSettings, how_read, measure
from .networks.extractor import FeatureExtractor, load_extractors
from .networks.images import load_extractor
from .networks.videos import load_video_extractor
from .pages.pictures import show
from .pages.report import Report
from .scores.frechet import FeatureStatistics
from .scores.metrics import METRICS, LackingError, Measured, SetPair, by_published_name, choose_metrics
from .scores.neighbours import Neighbourhoods
from .scores.score import Score, cautions
from .sets.cautions import content_flags, require_apart, sample_flags, set_notes
from .sets.images import open_images
from .sets.samples import (
    SampleKind,
    SampleSet,
    SetSummary,
    common_classes,
    holds_samples,
    holds_statistics,
)
from .sets.videos import open_videos

logger = logging.getLogger(__name__)

BOOTSTRAP = 20


def evaluate_images(
    real: str | Path,
    generated: str | Path,
    *,
    metrics: str | Sequence[str] = "auto",
    extractor: str | FeatureExtractor | Sequence[str | FeatureExtractor] = "auto",
    weights: str | Path | None = None,
    bootstrap: int = BOOTSTRAP,
    seed: int = 0,
    background: str = WHITE,
    max_skipped: float = 0.01,
    cache: str | Path | None = None,
    batch_size: int = 16,
    num_workers: int | None = None,
    device: str | None = None,
    trust_statistics: bool = False,
    trust_weights: bool = False,
) -> Report:
    """Score generated images against real ones.

    Each image is read once, and goes through each extractor once. Features are kept in a temporary folder
    (TMPDIR says where), so that memory does not depend on the number of images. Under ``accelerate launch``
    the processes share the work; with equally many threads in each, scores are those of one process.

    Args:
        real: folder of images, npz (ADM layout), zip, tar (webdataset), parquet or dataset, see
            ``evaluation.sets.images.open_images``; or statistics, as npz (``mu`` and
            ``sigma``) or torch-fidelity's .pt.
        generated: likewise, but no statistics; with the manifest.json of mhla generate or without.
        metrics: out of ``frechet``, ``sfid``, ``inception_score``, ``kid``, ``precision``, ``recall``,
            ``density``, ``coverage``, ``frechet_per_class`` and ``clip_score``; ``auto`` are all that the
            extractors and the sets allow; ``fid`` is ``frechet`` on Inception, clean-fid's where no
            extractor is named.
        extractor: ``auto``, ``inception`` (clean-fid's), ``inception_adm``, ``dinov2``, ``clip`` or
            ``efficientnet_lite0`` (see ``load_extractor``), an own one, or several.
        weights: of the extractor; of several extractors each as ``"name=weights"``.
        bootstrap: replicates of the bootstrap over samples that intervals come from; 0 for none.
        seed: of the bootstrap.
        background: colour behind transparent pixels, by its name in CSS or as #rrggbb; what the model was
            trained on, ``data.background``.
        max_skipped: files that cannot be read are skipped, named and counted up to this share of a set; more
            are an error.
        cache: folder in which features are kept for later runs, and from which a run that was stopped goes
            on. Files are known by their content.
        batch_size: images in one forward pass; changes the score by rounding only.
        num_workers: threads that decode and resize; one per CPU core, at most 8, by default.
        device: torch device; a GPU when there is one, by default.
        trust_statistics: accept statistics that do not state their extractor. The score is then flagged.
        trust_weights: run a torchscript that is given as ``weights`` and is not the published one. It is a
            program, which can read and write files.

    Returns:
        The scores with everything that has to be known to compare them; ``save`` writes it to a folder.

    Raises:
        ValueError: when a set is missing, empty or unreadable, something that a score needs is missing,
            statistics are of another extractor, or features are not finite.
        ImportError: when the ``eval`` extra is not installed.
    """
    metrics, extractor = by_published_name(metrics, extractor, "image")
    return _evaluate(
        real,
        generated,
        open_set=partial(open_images, background=background),
        load=partial(
            load_extractors,
            extractor,
            load_extractor,
            weights=weights,
            device=device,
            trust_weights=trust_weights,
        ),
        settings=_Settings(
            metrics=metrics,
            bootstrap=bootstrap,
            seed=seed,
            trust_statistics=trust_statistics,
            batch_size=batch_size,
            num_workers=num_workers,
            max_skipped=max_skipped,
            cache=cache,
        ),
    )


def evaluate_videos(
    real: str | Path,
    generated: str | Path,
    *,
    frames: int = 16,
    stride: int = 1,
    fps: float | None = None,
    frame_wise: bool = False,
    metrics: str | Sequence[str] = "auto",
    extractor: str | FeatureExtractor | Sequence[str | FeatureExtractor] = "auto",
    weights: str | Path | None = None,
    bootstrap: int = BOOTSTRAP,
    seed: int = 0,
    background: str = WHITE,
    max_skipped: float = 0.01,
    cache: str | Path | None = None,
    batch_size: int = 8,
    num_workers: int | None = None,
    device: str | None = None,
    trust_statistics: bool = False,
    trust_weights: bool = False,
) -> Report:
    """Score generated videos against real ones by the features of one clip of each.

    The clip begins at a random frame, which depends on ``seed`` and the name of the file alone. Memory does
    not depend on the number of videos. Where the sets have other frames per second, ``fps`` takes
    clips of both by time.

    Args:
        real: folder of videos or of folders of frames, zip or tar, npy of clips, see
            ``evaluation.sets.videos.open_videos``; or npz of statistics that an earlier
            call saved.
        generated: likewise, but no statistics; with the manifest.json of mhla generate or without.
        frames: of a clip; StyleGAN-V's protocol takes 16.
        stride: frames of the video from one of the clip to the next.
        fps: frames per second of a clip, chosen by the time at which they are shown, in place of a stride;
            videos with fewer are skipped and counted.
        frame_wise: score the frames of the clips as images, with an extractor of images: frame-wise FID.
        metrics: out of ``frechet``, ``kid``, ``precision``, ``recall``, ``density``, ``coverage`` and
            ``frechet_per_class``; ``auto`` are all that the sets allow; ``fvd`` is ``frechet`` on I3D.
        extractor: ``auto``, ``i3d``, ``cdfvd_i3d``, ``cdfvd_videomae``, ``videomae`` or ``transnetv2`` (see
            ``load_video_extractor``), an own one, or several; of images (see ``load_extractor``) when
            ``frame_wise``.
        weights: of the extractor; of several extractors each as ``"name=weights"``.
        bootstrap: replicates of the bootstrap over videos that intervals come from; 0 for none.
        seed: of the clips' beginnings and of the bootstrap.
        background: colour behind transparent pixels; see ``evaluate_images``.
        max_skipped: videos that cannot be read or are too short are skipped, named and counted up to this
            share of a set; more are an error.
        cache: folder in which features are kept for later runs; see ``evaluate_images``.
        batch_size: clips in one forward pass; changes the score by rounding only.
        num_workers: threads that decode and resize; one per CPU core, at most 8, by default.
        device: torch device; a GPU when there is one, by default.
        trust_statistics: accept statistics that do not state their extractor. The score is then flagged.
        trust_weights: run a torchscript that is given as ``weights`` and is not the published one. It is a
            program, which can read and write files.

    Returns:
        The scores with everything that has to be known to compare them; ``save`` writes it to a folder.

    Raises:
        ValueError: when a set is missing, empty or unreadable, statistics are of another extractor or other
            clips, or features are not finite.
        ImportError: when the ``eval`` extra is not installed.
    """
    metrics, extractor = by_published_name(metrics, extractor, "image" if frame_wise else "video")
    load = load_extractor if frame_wise else partial(load_video_extractor, frames=frames)
    return _evaluate(
        real,
        generated,
        open_set=partial(
            open_videos,
            frames=frames,
            stride=stride,
            fps=fps,
            seed=seed,
            frame_wise=frame_wise,
            background=background,
        ),
        load=partial(
            load_extractors, extractor, load, weights=weights, device=device, trust_weights=trust_weights
        ),
        settings=_Settings(
            metrics=metrics,
            bootstrap=bootstrap,
            seed=seed,
            trust_statistics=trust_statistics,
            batch_size=batch_size,
            num_workers=num_workers,
            max_skipped=max_skipped,
            cache=cache,
        ),
    )


def compute_statistics(
    images: str | Path,
    *,
    extractor: str | FeatureExtractor = "auto",
    weights: str | Path | None = None,
    background: str = WHITE,
    max_skipped: float = 0.01,
    cache: str | Path | None = None,
    batch_size: int = 16,
    num_workers: int | None = None,
    device: str | None = None,
    trust_weights: bool = False,
) -> FeatureStatistics:
    """Compute mean and covariance of the features of a set of images; arguments as for ``evaluate_images``.

    ``compute_statistics(...).save("cifar10.npz")`` gives a file to pass as ``real`` from then on.

    Raises:
        ValueError: when the set is missing, empty or unreadable, or features are not finite.
        ImportError: when the ``eval`` extra is not installed.
    """
    settings = PassSettings(batch_size, num_workers, max_skipped, cache)
    image_set = open_images(images, background)
    process_state()  # before a device is chosen
    for note in image_set.notes:
        logger.warning("Caution: %s", note)
    loaded = load_extractor(extractor, weights=weights, device=device, trust_weights=trust_weights)
    found = measure(image_set, [loaded], settings, title="images")
    return in_first_process(lambda: found.measured[loaded.name].statistics)


@dataclass(frozen=True)
class _Settings(PassSettings):
    """Arguments that scoring images and scoring videos have in common; see :func:`evaluate_images`."""

    metrics: str | Sequence[str] = "auto"
    bootstrap: int = BOOTSTRAP
    seed: int = 0
    trust_statistics: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bootstrap != 0 and self.bootstrap < 2:
            raise ValueError(f"bootstrap must be 0 (no intervals) or at least 2, got {self.bootstrap}")
        require_seed(self.seed)


@one_fate()
def _evaluate(
    real: str | Path,
    generated: str | Path,
    *,
    open_set: Callable[[str | Path], SampleSet],
    load: Callable[[], Sequence[FeatureExtractor]],
    settings: _Settings,
) -> Report:
    """Score one set against another, whatever they are of; extractors are loaded once both sets are there."""
    require("jinja2")  # of the report: missed now, and not after the work
    for name, given in (("real", real), ("generated", generated)):
        if not isinstance(given, (str, Path)):
            raise ValueError(
                f"{name} must be the path of a set, a str or a Path, got {type(given).__name__}: save "
                "samples to a folder first (uint8 arrays as arr_0 of an npz)"
            )
    process_state()  # before a device is chosen
    real_set = open_set(real) if holds_samples(real) else None
    generated_set = open_set(generated)
    require_apart(real_set, generated_set)
    extractors, known, flags = load(), None, list[str]()
    if holds_statistics(real):
        known, flags = _known(Path(real), generated_set.kind, extractors, trust=settings.trust_statistics)
    chosen = choose_metrics(settings.metrics, extractors, real_set, generated_set, known)
    for package in {METRICS[name].package for name, _ in chosen} - {""}:
        require(package)
    flags += set_notes(real_set, generated_set)
    with tempfile.TemporaryDirectory() as scratch:
        pass_over = partial(measure, extractors=extractors, settings=settings, scratch=Path(scratch))
        first = None if real_set is None else pass_over(real_set, title="real")
        if known is not None:
            flags += _other_count(known, first, chosen)
            first = _given(Path(real), known, extractors[0], first)
        second = pass_over(generated_set, title="generated")

        def judge() -> Report:
            assert first is not None
            copies = len(set(second.digests) & set(first.digests))
            summary = replace(second.summary, copies=copies)
            largest = max(extractor.dimension for extractor in extractors)
            behind = first.summary if known is None else replace(first.summary, count=known.count)
            flags.extend(sample_flags(generated_set, largest, behind, summary))
            flags.extend(content_flags(generated_set, first.summary, summary))
            classes = common_classes(real_set, generated_set)
            scores, found = _scores(first, second, classes, chosen, settings, flags)
            pictures, neighbours = show(real_set, generated_set, first, second, found)
            return Report(
                scores=scores,
                real=first.summary,
                generated=summary,
                protocol=_protocol(generated_set.kind, extractors, settings, [name for name, _ in chosen]),
                real_statistics=first.measured[extractors[0].name].statistics,
                kind=generated_set.kind.name,
                pictures=pictures,
                neighbours=neighbours,
            )

        return in_first_process(judge)


def _scores(
    real: Pass,
    generated: Pass,
    classes: tuple[list[str], list[str]] | None,
    chosen: Sequence[tuple[str, FeatureExtractor]],
    settings: _Settings,
    flags: list[str],
) -> tuple[list[Score], Neighbourhoods | None]:
    """Compute all scores, and neighbourhoods when scores need them; log the scores, then their cautions."""
    scores, lacking, neighbourhoods = list[Score](), list[str](), None
    for extractor in {extractor.name: extractor for _, extractor in chosen}.values():
        sets = SetPair(
            extractor=extractor,
            real=_labelled(real, extractor, classes and classes[0]),
            generated=_labelled(generated, extractor, classes and classes[1]),
            replicates=settings.bootstrap,
            seed=settings.seed,
        )
        said = flags + ([extractor.caution] if extractor.caution else [])
        for name, its in chosen:
            if its is extractor:
                try:
                    score = METRICS[name].compute(sets, name)
                except LackingError as error:  # files that could not be read are known by now alone
                    lacking.append(f"No {extractor.full_name(name)}: {error}.")
                    continue
                scores.append(replace(score, flags=[*score.flags, *said]))
                logger.info("%s", scores[-1])
        # A cached property is there once a score has asked for it.
        neighbourhoods = neighbourhoods or sets.__dict__.get("neighbourhoods")
    if not scores:
        raise ValueError(f"no score can be computed from what could be read: {' '.join(lacking)}")
    scores = [replace(score, flags=[*score.flags, *lacking]) for score in scores]
    for caution in cautions(scores):
        logger.warning("Caution: %s", caution)
    return scores, neighbourhoods


def _labelled(found: Pass, extractor: FeatureExtractor, classes: list[str] | None) -> Measured:
    measured = found.measured[extractor.name]
    return measured if classes is None else replace(measured, labels=[classes[i] for i in found.indices])


def _known(
    path: Path, kind: SampleKind, extractors: Sequence[FeatureExtractor], *, trust: bool
) -> tuple[FeatureStatistics, list[str]]:
    """Load statistics, refused unless they are of this extractor and the same frames of videos."""
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
            f"{path} was made with the extractor {stated[0]} (weights sha256 {stated[1][:12]}), not with "
            f"{extractor.name} ({extractor.weights_sha256[:12]}): use that one, or give the {kind.name}s"
        )
    reading = how_read(extractor, kind)
    if statistics.extractor is not None and statistics.reading is None:
        flags.append(f"{path.name} does not state how pixels were read; now it is: {reading}.")
    if statistics.reading not in (None, reading):
        raise ValueError(
            f"{path} is of {kind.name}s that were read otherwise ({statistics.reading}) than now "
            f"({reading}): make it anew, or give the {kind.name}s"
        )
    if statistics.extractor is not None and statistics.sampling != kind.sampling:
        raise ValueError(
            f"{path} is of {statistics.sampling or 'images'}, not of {kind.sampling or 'images'}: sample the "
            f"generated ones in the same way, or give the {kind.name}s"
        )
    return statistics, flags


def _given(path: Path, known: FeatureStatistics, extractor: FeatureExtractor, found: Pass | None) -> Pass:
    """Put statistics in the place of a set that was passed over, or of its own statistics."""
    digest = None
    if known.fingerprint is None:  # nothing else tells them from others
        digest = hashlib.sha256(known.mu.tobytes() + known.sigma.tobytes()).hexdigest()
    if found is None:
        summary = SetSummary(str(path), known.count, known.fingerprint, statistics_sha256=digest)
        return Pass({extractor.name: Measured(known)}, summary)
    measured = {
        name: replace(measured, statistics=known, own_statistics=False)
        for name, measured in found.measured.items()
    }
    return replace(found, measured=measured, summary=replace(found.summary, statistics_sha256=digest))


def _other_count(
    known: FeatureStatistics, found: Pass | None, chosen: Sequence[tuple[str, FeatureExtractor]]
) -> list[str]:
    """Return a caution where statistics are of more or fewer images than lie beside them, as ADM's are."""
    asked = any(name == "frechet" for name, _ in chosen)
    if found is None or known.count == found.summary.count or not asked:
        return []
    stated = "an unstated number of images" if known.count is None else f"{known.count:,} images"
    return [
        f"The Frechet distance is to statistics of {stated}; other scores, and the count of real images, are "
        f"of the {found.summary.count:,} that lie beside these."
    ]


def _protocol(
    kind: SampleKind,
    extractors: Sequence[FeatureExtractor],
    settings: _Settings,
    metrics: Sequence[str],
) -> dict[str, Any]:
    """Protocol: everything besides the samples that a score depends on."""
    packages = [package for extractor in extractors for package in extractor.packages]
    return {
        "extractors": {extractor.name: _describe(extractor) for extractor in extractors},
        "scores": {name: METRICS[name].definition for name in dict.fromkeys(metrics)},
        "intervals": f"95 %: 1.96 standard deviations of {settings.bootstrap} bootstrap replicates over "
        f"samples (seed {settings.seed}) on either side; "
        + "; ".join(dict.fromkeys(METRICS[name].spread for name in metrics if METRICS[name].spread))
        + "; of shares Wilson's, where that is wider"
        if settings.bootstrap
        else "none",
        "conversion": kind.conversion,
        **({"clips": kind.sampling} if kind.sampling else {}),
        "fingerprint": f"sha256 over shape and RGB pixels of the scored {kind.name}s, in reading order",
        "batch_size": settings.batch_size,
        "device": extractors[0].device,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": sys.version.split()[0], **_versions(packages)},
    }


def _describe(extractor: FeatureExtractor) -> dict[str, Any]:
    return {
        **({"chosen": f"by auto, because {extractor.chosen}"} if extractor.chosen else {}),
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
