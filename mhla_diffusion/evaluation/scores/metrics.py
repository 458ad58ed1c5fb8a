"""Every score: what it needs, how it is computed from features, and its interval."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...optional import require
from ..networks.extractor import FeatureExtractor
from ..sets.samples import SampleSet, common_classes
from .frechet import Array, FeatureStatistics, frechet_distance
from .neighbours import MIN_SAMPLES, Neighbourhoods, find_neighbourhoods
from .resampling import (
    KERNEL_SAMPLES,
    Features,
    Gaussian,
    Replicates,
    class_replicates,
    draw_replicates,
    extrapolate,
    frechet_curve,
    frechet_of_features,
    frechet_replicates,
    interval,
    kernel_replicates,
    means,
)
from .score import Score

INCEPTION_SCORE_CHUNK = 5_000
KID_SUBSET = 1_000


class LackingError(ValueError):
    """Score that what was read does not suffice for; the message says why."""


@dataclass(frozen=True)
class Measured:
    """Features that one extractor gives of one set.

    Args:
        statistics: mean and covariance of each output that has some, by its name.
        features: each output of the extractor, ``[N, d]`` float32 on disk, by its name; empty when the set
            is known by its statistics alone.
        own_statistics: whether the statistics are those of the features; ADM's reference batches have the
            statistics of more samples than they hold.
        labels: class of each sample, as far as known.
        prompts: what each sample was generated from; None where not known.
        group: samples behind each other that belong together, as the frames of one video.
    """

    statistics: FeatureStatistics
    features: dict[str, Features] = field(default_factory=dict)
    own_statistics: bool = True
    labels: Sequence[str] | None = None
    prompts: Sequence[str | None] = ()
    group: int = 1


@dataclass(frozen=True)
class SetPair:
    """Pair of sets that one extractor has seen, and how to find the spread of their scores.

    Args:
        extractor: of the features.
        real, generated: the sets.
        replicates: of the bootstrap; 0 for no intervals.
        seed: of every draw but those of KID's subsets, which are torch-fidelity's own.
    """

    extractor: FeatureExtractor
    real: Measured
    generated: Measured
    replicates: int
    seed: int

    @cached_property
    def drawn(self) -> Replicates:
        """Draws of the bootstrap, the same for every score."""
        real = self.real.features.get("features")
        return draw_replicates(
            None if real is None else len(real),
            len(self.generated.features["features"]),
            count=self.replicates,
            seed=self.seed,
            group=self.generated.group,
        )

    @cached_property
    def neighbourhoods(self) -> Neighbourhoods:
        """Neighbourhoods of both sets; see :func:`find_neighbourhoods`."""
        return find_neighbourhoods(self.real.features["features"], self.generated.features["features"])

    def score(
        self,
        metric: str,
        value: float,
        replicates: Array | None = None,
        share_of: int | None = None,
        **more: object,
    ) -> Score:
        """Return a score under its full name, with its interval; see :func:`interval`."""
        bounds = METRICS[metric].bounds
        return Score(
            name=self.extractor.full_name(metric),
            value=value,
            metric=metric,
            extractor=self.extractor.name,
            interval=None if replicates is None else interval(value, replicates, bounds, share_of=share_of),
            higher_is_better=METRICS[metric].higher_is_better,
            **more,  # type: ignore[arg-type]
        )


def _frechet(sets: SetPair, metric: str, output: str) -> Score:
    a, b = sets.real.statistics, sets.generated.statistics
    if output != "features":
        assert a.spatial is not None
        assert b.spatial is not None
        a, b = a.spatial, b.spatial
    known, ddof = Gaussian(a.mu, a.sigma), sets.extractor.ddof
    real = sets.real.features.get(output) if sets.real.own_statistics else None
    generated = sets.generated.features[output]
    found = frechet_replicates(real, known, generated, sets.drawn, ddof=ddof)
    smallest = min(len(x) for x in (real, generated) if x is not None)
    curve = []
    group = sets.generated.group
    if sets.replicates and smallest >= 4 * group:
        curve = frechet_curve(real, known, generated, ddof=ddof, seed=sets.seed, group=group)
    # With fewer samples than dimensions the bias does not fall as 1 / N yet.
    enough = bool(curve) and smallest // (2 * group) > len(a.mu)
    score = sets.score(
        metric,
        frechet_distance(a.mu, a.sigma, b.mu, b.sigma),
        found,
        curve=curve,
        extrapolated=max(extrapolate(curve), 0.0) if enough else None,
    )
    if score.interval is None or score.extrapolated is None:
        return score
    if score.interval[0] <= score.extrapolated <= score.interval[1]:
        return score
    return replace(score, flags=[_BIAS_OUTSIDE])


_BIAS_OUTSIDE = (
    "The interval is of sets of this size, and does not hold what the distance comes to with infinitely many "
    "samples: compare it with sets of as many alone."
)


def _per_class(sets: SetPair, metric: str) -> Score:
    """Mean of the distances of the classes that both sets have; what other classes there are is flagged."""
    real, generated = (np.asarray(measured.labels) for measured in (sets.real, sets.generated))
    x, y = sets.real.features["features"], sets.generated.features["features"]
    ddof, drawn = sets.extractor.ddof, sets.drawn
    assert drawn.real is not None
    classes, spread, lacking, fewest = {}, [], [], len(x)
    for name in dict.fromkeys([*real.tolist(), *generated.tolist()]):
        i, j = np.flatnonzero(real == name), np.flatnonzero(generated == name)
        if min(len(i), len(j)) > 1:
            fewest = min(fewest, len(i), len(j))
            ours = replace(drawn, real=drawn.real[i], generated=drawn.generated[j])
            classes[str(name)] = frechet_of_features(x[i], y[j], ddof=ddof)
            spread.append(class_replicates(x[i], y[j], ours, ddof=ddof))
        else:
            lacking.append(f"{name} ({len(i)} real, {len(j)} generated)")
    if not classes:
        raise LackingError("no class has two samples or more in both sets")
    flags = []
    if fewest <= x.shape[1]:
        flags.append(
            f"Classes have {fewest:,} samples and more for {x.shape[1]}-dimensional features: the mean over "
            "them is biased upwards, the more the smaller they are."
        )
    if lacking:
        flags.append(
            f"{len(lacking)} of {len(lacking) + len(classes)} classes have fewer than two samples in one "
            f"of the sets and are not part of the mean: {_some(lacking)}."
        )
    return sets.score(
        metric, float(np.mean(list(classes.values()))), np.mean(spread, axis=0), classes=classes, flags=flags
    )


def _some(names: Sequence[str]) -> str:
    """List names, of many the first ten."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _kernel_distance(sets: SetPair, metric: str) -> Score:
    """Mean over torch-fidelity's 100 subsets; its interval is that of the estimate on many samples."""
    real, generated = sets.real.features["features"], sets.generated.features["features"]
    fidelity = require(METRICS[metric].package)
    size = min(KID_SUBSET, len(real), len(generated))
    found = fidelity.kid_features_to_metric(
        _tensor(generated), _tensor(real), kid_subset_size=size, verbose=False
    )
    spread = kernel_replicates(real, generated, sets.drawn, fidelity.kernel_poly, seed=sets.seed)
    return sets.score(metric, float(found[fidelity.KEY_METRIC_KID_MEAN]), spread)


def _inception_score(sets: SetPair, metric: str) -> Score:
    """Mean over consecutive chunks of 5,000 (ADM), a shorter last one included."""
    fidelity = require(METRICS[metric].package)
    logits = sets.generated.features["logits"]
    scores, spread = [], []
    for start in range(0, len(logits), INCEPTION_SCORE_CHUNK):
        rows = slice(start, start + INCEPTION_SCORE_CHUNK)
        chunk = _tensor(logits[rows])
        found = fidelity.isc_features_to_metric(chunk, splits=1, shuffle=False)
        scores.append(found[fidelity.KEY_METRIC_ISC_MEAN])
        counts = sets.drawn.generated[rows]
        log_p = chunk.double().log_softmax(dim=1).numpy()
        p = np.exp(log_p)
        marginal = p.T @ counts / counts.sum(axis=0)  # [1008, R]
        negative_entropy = means((p * log_p).sum(axis=1), counts)
        spread.append(np.exp(negative_entropy - (marginal * np.log(marginal)).sum(axis=0)))
    flags, last = [], len(logits) % INCEPTION_SCORE_CHUNK
    if last:
        flags.append(
            f"{'The last chunk has' if len(logits) > last else 'There are'} {last:,} images in place of "
            f"{INCEPTION_SCORE_CHUNK:,}: the Inception score of few images is lower."
        )
    return sets.score(metric, float(np.mean(scores)), np.mean(spread, axis=0), flags=flags)


def _neighbourhood(sets: SetPair, metric: str) -> Score:
    """Mean over generated samples, or over real ones; the balls stay as they are in its replicates."""
    smallest = min(len(measured.features["features"]) for measured in (sets.real, sets.generated))
    if smallest < MIN_SAMPLES:
        raise LackingError(f"it needs {MIN_SAMPLES} readable samples in each set, and there are {smallest}")
    values: Array = getattr(sets.neighbourhoods, metric)
    counts = sets.drawn.real if metric in ("recall", "coverage") else sets.drawn.generated
    assert counts is not None
    share_of = None if metric == "density" else len(values)  # which counts balls, not samples
    return sets.score(metric, float(values.mean()), means(values, counts), share_of)


def _clip_score(sets: SetPair, metric: str) -> Score:
    """Mean of ``100 max(cos, 0)`` of an image and its text (Hessel et al. 2021, as torchmetrics)."""
    assert sets.extractor.embed_texts is not None
    images = sets.generated.features["features"]
    missing = sum(prompt is None for prompt in sets.generated.prompts)
    if missing:
        raise LackingError(f"it needs the prompt of every image, and {missing} have none")
    texts, cut = sets.extractor.embed_texts([str(prompt) for prompt in sets.generated.prompts])
    cosine = np.einsum("nd,nd->n", images, texts, dtype=np.float64)
    cosine /= np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    values = 100 * np.maximum(cosine, 0)
    score = sets.score(metric, float(values.mean()), means(values, sets.drawn.generated))
    if not cut:
        return score
    flag = f"{cut} of {len(values):,} prompts are longer than the text encoder takes: they were cut."
    return replace(score, flags=[*score.flags, flag])


@dataclass(frozen=True)
class Metric:
    """Metric: how a score is computed and what it needs.

    Args:
        compute: takes the sets and the metric's name.
        definition: in words, for the protocol.
        output: of the extractor that it is computed from.
        needs_real: whether the real samples themselves are needed, not their statistics.
        needs_classes: whether both sets must have classes.
        needs_texts: whether prompts and an extractor that embeds texts are needed.
        needs_single: whether it compares samples one by one, which frames of one video, alike as they are,
            cannot stand for.
        min_samples: of each set.
        higher_is_better: else lower is.
        bounds: least and largest value; intervals end there.
        package: of an extra that it is computed with, if one.
        spread: how its interval differs from what fresh sets of both kinds would show, for the protocol.
    """

    compute: Callable[[SetPair, str], Score]
    definition: str
    output: str = "features"
    needs_real: bool = True
    needs_classes: bool = False
    needs_texts: bool = False
    needs_single: bool = False
    min_samples: int = 2
    higher_is_better: bool = False
    bounds: tuple[float, float] = (0.0, math.inf)
    package: str = ""
    spread: str = ""


# Repeated samples make the bias of a distance vary from replicate to replicate, by about sqrt(2 / N) of it.
_WIDE = (
    "of Frechet distances they are wider than fresh sets would spread, by half and more where samples are "
    "hardly more than dimensions"
)
_HALF = (
    "of precision, recall, density and coverage they are of the samples that are counted, with the balls of "
    "the other set as they are: fresh sets of both would spread up to twice as far"
)
_BALLS = "Kynkaanniemi et al. 2019, k = 3, each set's own radii"
_DENSE_BALLS = "Naeem et al. 2020, k = 5"


def _share(definition: str) -> Metric:
    """Return the metric of a share of samples that lie in balls."""
    return Metric(
        _neighbourhood,
        definition,
        needs_single=True,
        min_samples=MIN_SAMPLES,
        higher_is_better=True,
        bounds=(0.0, 1.0),
        spread=_HALF,
    )


METRICS = {
    "frechet": Metric(
        partial(_frechet, output="features"),
        "squared Frechet distance of Gaussians fitted to the features",
        needs_real=False,
        package="scipy.linalg",
        spread=_WIDE,
    ),
    "sfid": Metric(
        partial(_frechet, output="spatial"),
        "the same of the first 7 channels of mixed_6/conv, 2023 values (Nash et al. 2021)",
        output="spatial",
        needs_real=False,
        package="scipy.linalg",
        spread=_WIDE,
    ),
    "inception_score": Metric(
        _inception_score,
        "from logits without bias, the mean over consecutive chunks of 5,000 (ADM)",
        output="logits",
        package="torch_fidelity.metric_isc",
        needs_real=False,
        higher_is_better=True,
        bounds=(1.0, math.inf),
    ),
    "kid": Metric(
        _kernel_distance,
        "squared maximum mean discrepancy with the kernel (x y / d + 1)^3, unbiased, the mean over 100 "
        "random subsets of 1,000, or of all samples of the smaller set when it has fewer (torch-fidelity)",
        needs_single=True,
        package="torch_fidelity.metric_kid",
        bounds=(-math.inf, math.inf),  # an unbiased estimate of a small distance may fall below 0
        spread=f"of KID they are of the estimate on at most {KERNEL_SAMPLES:,} samples of each set, without "
        "the noise of its subsets",
    ),
    "precision": _share(_BALLS),
    "recall": _share(_BALLS),
    "density": replace(_share(_DENSE_BALLS), bounds=(0.0, math.inf)),
    "coverage": _share(_DENSE_BALLS),
    "frechet_per_class": Metric(
        _per_class,
        "the mean of the Frechet distances of the classes that both sets have",
        needs_classes=True,
        package="scipy.linalg",
        spread=_WIDE,
    ),
    "clip_score": Metric(
        _clip_score,
        "the mean of 100 max(cos, 0) between the embeddings of an image and its prompt",
        needs_real=False,
        needs_texts=True,
        higher_is_better=True,
        bounds=(0.0, 100.0),
    ),
}


# Scores that papers report under a name of their own: of what, which metric on which extractors, the first
# of which is taken where none is asked for.
_PUBLISHED = {
    "fid": ("image", "frechet", ("inception", "inception_adm")),
    "fvd": ("video", "frechet", ("i3d", "cdfvd_i3d")),
}


def by_published_name(metrics: Any, extractor: Any, kind: str) -> tuple[Any, Any]:
    """Return metrics and extractors with ``fid`` and ``fvd`` as what they are: a metric on an extractor.

    Args:
        metrics, extractor: as ``evaluate_images`` takes them.
        kind: ``"image"`` or ``"video"``.

    Raises:
        ValueError: when one is of the other kind, or another extractor is asked for beside it.
    """
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    for name in [name for name in names if name in _PUBLISHED]:
        its_kind, metric, fit = _PUBLISHED[name]
        given = [extractor] if isinstance(extractor, (str, FeatureExtractor)) else list(extractor)
        found = [str(getattr(one, "name", one)).partition("=")[0] for one in given]
        if its_kind != kind:
            raise ValueError(f"{name} is of {its_kind}s: use mhla evaluate {its_kind}")
        if found == ["auto"]:
            extractor = fit[0]
        elif not set(found) & set(fit):
            raise ValueError(
                f"{name} is the Frechet distance on {' or '.join(fit)}, and the extractor asked for is "
                f"{', '.join(found)}: leave it out, or ask for {metric}, whose name will say what it is on"
            )
        names[names.index(name)] = metric
    return (names if names != [metrics] else metrics), extractor


def choose_metrics(
    asked: str | Sequence[str],
    extractors: Sequence[FeatureExtractor],
    real: SampleSet | None,
    generated: SampleSet,
    known: FeatureStatistics | None = None,
) -> list[tuple[str, FeatureExtractor]]:
    """Choose the scores that are computed, and the extractor of each.

    Args:
        asked: names out of ``METRICS``, or ``"auto"``: every score that all is there for.
        extractors: that were loaded.
        real, generated: the sets; the real one None when it is known by its statistics alone.
        known: statistics of the real set that were given, if any.

    Raises:
        ValueError: for an unknown name, or one that something is missing for; the message says what.
    """
    names = list(METRICS) if asked == "auto" else [asked] if isinstance(asked, str) else list(asked)
    if unknown := [name for name in names if name not in METRICS]:
        choices = ", ".join([*METRICS, *_PUBLISHED])
        raise ValueError(f"metric {unknown[0]!r} is unknown; choose auto, or out of {choices}")
    chosen = []
    for name in names:
        metric = METRICS[name]
        fit = [
            extractor
            for extractor in extractors
            if metric.output in extractor.outputs and (extractor.embed_texts or not metric.needs_texts)
        ]
        missing = _missing(metric, fit, real, generated, known)
        if missing and asked != "auto":
            raise ValueError(f"{name} needs {missing}")
        if not missing:
            chosen += [(name, extractor) for extractor in fit]
    return chosen


def _missing(
    metric: Metric,
    fit: Sequence[FeatureExtractor],
    real: SampleSet | None,
    generated: SampleSet,
    known: FeatureStatistics | None,
) -> str | None:
    """Return what a metric needs and is not there, in words; None when all is."""
    smallest = min(len(samples.names) for samples in (real, generated) if samples is not None)
    if not fit:
        return f"the extractor {'clip' if metric.needs_texts else 'inception_adm'}"
    if metric.needs_single and generated.group > 1:
        return "samples one by one, and frames of one video are alike: leave frame_wise out"
    if metric.needs_real and real is None:
        return "the real samples, not their statistics"
    if metric.output == "spatial" and known is not None and known.spatial is None:
        return "statistics with mu_s and sigma_s, or the real samples"
    if metric.needs_classes and not _has_pairs(common_classes(real, generated)):
        return (
            "classes in both sets, at least one of them with two samples in each: subfolders of the same "
            "names, labels in an npz or class ids in a manifest"
        )
    if metric.needs_texts and (without := sum(name not in generated.prompts for name in generated.names)):
        return (
            "the prompt of every generated image in the manifest.json of their folder, and "
            f"{without} have none"
        )
    if smallest < metric.min_samples:
        return f"at least {metric.min_samples} samples in each set, and there are {smallest}"
    return None


def _has_pairs(classes: tuple[list[str], list[str]] | None) -> bool:
    """Check that a class has two samples or more in both sets."""
    if classes is None:
        return False
    real, generated = map(Counter, classes)
    return any(min(count, generated[name]) > 1 for name, count in real.items())


def _tensor(features: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(np.asarray(features))
