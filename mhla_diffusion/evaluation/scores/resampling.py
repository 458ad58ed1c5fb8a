"""How far a score would differ with other samples, and what it would be with infinitely many.

Intervals come from the bootstrap over samples: every replicate draws both sets anew, with replacement. A
replicate is a vector of counts, how often each sample was drawn, so that scores which are means of values
cost one matrix product for all replicates together.

Replicates of a Frechet distance are larger than the distance, as sets with repeated samples are smaller sets.
Their spread is what is used: an interval is the score plus and minus 1.96 standard deviations of its
replicates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from .frechet import Array, RunningStatistics, frechet_distance

Features = NDArray[np.float32]

ROWS = 1024
CURVE_POINTS = 8
KERNEL_SAMPLES = 10_000
"""Of each set at most, in the bootstrap of KID, whose work grows with their square."""


@dataclass(frozen=True)
class Replicates:
    """Number of times that each sample is drawn: ``real`` ``[N, R]`` and ``generated`` ``[M, R]``.

    ``real`` is None when the real samples are not known, but only their statistics: these stay the same.
    """

    real: Array | None
    generated: Array

    @property
    def count(self) -> int:
        """Number of replicates, R."""
        return self.generated.shape[1]


def draw_replicates(
    num_real: int | None, num_generated: int, *, count: int, seed: int, group: int = 1
) -> Replicates:
    """Draw ``count`` replicates of sets of these sizes; each ``group`` of neighbours is drawn as one."""
    rng = np.random.default_rng(seed)

    def draw(size: int) -> Array:
        size //= group
        drawn = rng.multinomial(size, np.full(size, 1 / size), size=count).T.astype(np.float64)
        return drawn.repeat(group, axis=0)

    return Replicates(None if num_real is None else draw(num_real), draw(num_generated))


def interval(
    value: float,
    replicates: Array,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    *,
    share_of: int | None = None,
) -> tuple[float, float] | None:
    """Return ``value`` plus and minus 1.96 standard deviations of its replicates (95 %); None without any.

    Replicates that are not finite, as of a set that was drawn as one sample alone, are left out. The interval
    ends where the range of the metric, ``bounds``, does. That of a share of ``share_of`` samples holds
    Wilson's too: where none of them or all have a property, all replicates are alike.
    """
    replicates = replicates[np.isfinite(replicates)]
    if len(replicates) < 2:
        return None
    reach = 1.96 * float(np.std(replicates, ddof=1))
    low, high = max(value - reach, bounds[0]), min(value + reach, bounds[1])
    if share_of is None:
        return low, high
    least, most = _wilson(value, share_of)
    return min(low, least), max(high, most)


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of 95 % (1927), which is never empty."""
    z = 1.96**2 / count
    middle, reach = share + z / 2, math.sqrt(z * share * (1 - share) + z * z / 4)
    return max(0.0, (middle - reach) / (1 + z)), min(1.0, (middle + reach) / (1 + z))


def means(values: Array, counts: Array) -> Array:
    """Return the mean of ``values`` ``[N]`` in each replicate ``[N, R]``."""
    return values @ counts / counts.sum(axis=0)


@dataclass(frozen=True)
class Gaussian:
    """Gaussian of mean and covariance, ``[d]`` and ``[d, d]``."""

    mu: Array
    sigma: Array


def gaussian(features: Features, *, ddof: int, counts: Array | None = None) -> Gaussian:
    """Return mean and covariance of features ``[N, d]``, each taken as often as ``counts`` ``[N]`` says."""
    running = RunningStatistics(features.shape[1], ddof=ddof)
    for start in range(0, len(features), ROWS):
        rows = np.asarray(features[start : start + ROWS])
        running.update(rows if counts is None else rows.repeat(counts[start : start + ROWS].astype(int), 0))
    return Gaussian(running.mean, running.covariance)


def frechet_replicates(
    real: Features | None, known: Gaussian, generated: Features, drawn: Replicates, *, ddof: int
) -> Array:
    """Return the Frechet distance in each replicate, ``[R]``; ``known`` for ``real`` when that is None."""
    return np.array(
        [
            _distance(
                real, known, generated, None if drawn.real is None else drawn.real[:, i],
                drawn.generated[:, i], ddof,
            )
            for i in tqdm(range(drawn.count), desc="intervals", unit="replicate", leave=False)
        ]
    )  # fmt: skip


def class_replicates(real: Features, generated: Features, drawn: Replicates, *, ddof: int) -> Array:
    """Return the Frechet distance of one class in each replicate of the whole sets, ``[R]``.

    NaN where fewer than two of its samples were drawn.
    """
    assert drawn.real is not None
    pairs = zip(drawn.real.T, drawn.generated.T, strict=True)
    return np.array(
        [
            frechet_of_features(real, generated, ddof=ddof, counts=(a, b))
            if min(a.sum(), b.sum()) > 1
            else np.nan
            for a, b in pairs
        ]
    )


def _distance(
    real: Features | None, known: Gaussian, generated: Features, a: Array | None, b: Array, ddof: int
) -> float:
    """Return the Frechet distance of sets with each sample as often as the counts ``a`` and ``b`` say."""
    if real is not None:
        assert a is not None
        return frechet_of_features(real, generated, ddof=ddof, counts=(a, b))
    other = gaussian(generated, ddof=ddof, counts=b)
    return frechet_distance(known.mu, known.sigma, other.mu, other.sigma)


def frechet_of_features(
    real: Features, generated: Features, *, ddof: int, counts: tuple[Array, Array] | None = None
) -> float:
    """Return the Frechet distance of two sets of features ``[N, d]`` and ``[M, d]``.

    With no more different samples than dimensions the features themselves are factors of the covariances, and
    the trace is the sum of the singular values of their ``N x M`` products (see ``frechet_distance``).
    """
    a, b = counts or (np.ones(len(real)), np.ones(len(generated)))
    if max(np.count_nonzero(a), np.count_nonzero(b)) > real.shape[1]:
        x, y = gaussian(real, ddof=ddof, counts=a), gaussian(generated, ddof=ddof, counts=b)
        return frechet_distance(x.mu, x.sigma, y.mu, y.sigma)
    (mu1, factor1), (mu2, factor2) = _centred(real, a, ddof), _centred(generated, b, ddof)
    overlap = np.linalg.svd(factor1 @ factor2.T, compute_uv=False).sum()
    distance = np.square(mu1 - mu2).sum() + np.square(factor1).sum() + np.square(factor2).sum() - 2 * overlap
    return max(float(distance), 0.0)


def _centred(features: Features, counts: Array, ddof: int) -> tuple[Array, Array]:
    """Return the mean ``[d]``, and rows ``[n, d]`` whose products add up to the covariance."""
    taken = counts > 0
    x, w = features[taken].astype(np.float64), counts[taken]
    mu = w @ x / w.sum()
    return mu, (x - mu) * np.sqrt(w / (w.sum() - ddof))[:, None]


def frechet_curve(
    real: Features | None, known: Gaussian, generated: Features, *, ddof: int, seed: int, group: int = 1
) -> list[tuple[int, float]]:
    """Return the Frechet distance of random subsets of half to all samples, against their number.

    Of both sets the same share is taken, so that the bias of both falls as 1 / N. Of real samples that are
    known by their statistics alone all are taken, and their part of the bias stays. Each ``group`` of
    neighbours is taken as one.
    """
    rng = np.random.default_rng(seed)

    def choose(size: int, share: float) -> Array:
        """Draw a subset: 1 for its samples, else 0."""
        size //= group
        return (rng.permutation(size) < round(share * size)).astype(np.float64).repeat(group)

    curve = []
    for share in tqdm(np.linspace(0.5, 1, CURVE_POINTS), desc="score against N", unit="subset", leave=False):
        a = None if real is None else choose(len(real), share)
        b = choose(len(generated), share)
        curve.append((int(b.sum()), _distance(real, known, generated, a, b, ddof)))
    return curve


def extrapolate(curve: list[tuple[int, float]]) -> float:
    """Return the value at infinitely many samples, of a line in 1 / N (Chong and Forsyth 2020)."""
    counts, values = np.array(curve).T
    return float(np.polynomial.Polynomial.fit(1 / counts, values, 1)(0.0))


def kernel_replicates(
    real: Features, generated: Features, drawn: Replicates, kernel: Callable[..., Array], *, seed: int
) -> Array:
    """Return the unbiased squared maximum mean discrepancy in each replicate, ``[R]``.

    Pairs of a sample with itself are left out, also where it was drawn twice, as the estimate would be biased
    by them.
    """
    assert drawn.real is not None
    rng = np.random.default_rng(seed)
    x, a = _at_most(real, drawn.real, rng)
    y, b = _at_most(generated, drawn.generated, rng)
    within = [_kernel_sum(z, z, w, w, kernel, distinct=True) for z, w in ((x, a), (y, b))]
    pairs = [w.sum(axis=0) ** 2 - np.square(w).sum(axis=0) for w in (a, b)]
    between = _kernel_sum(x, y, a, b, kernel, distinct=False) / (a.sum(axis=0) * b.sum(axis=0))
    with np.errstate(invalid="ignore"):  # one sample drawn alone has no pairs
        return within[0] / pairs[0] + within[1] / pairs[1] - 2 * between


def _at_most(features: Features, counts: Array, rng: np.random.Generator) -> tuple[Features, Array]:
    chosen = np.sort(rng.permutation(len(features))[:KERNEL_SAMPLES])
    return np.asarray(features[chosen]), counts[chosen]


def _kernel_sum(
    x: Features, y: Features, a: Array, b: Array, kernel: Callable[..., Array], *, distinct: bool
) -> Array:
    """Return ``sum_ij a_i b_j k(x_i, y_j)`` of each replicate, without ``i = j`` when ``distinct``."""
    total = np.zeros(a.shape[1])
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        values = kernel(x[rows], y).astype(np.float64)
        if distinct:
            np.fill_diagonal(values[:, rows], 0)
        total += np.einsum("nr,nr->r", a[rows], values @ b)
    return total
