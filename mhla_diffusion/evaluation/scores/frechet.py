"""Mean and covariance of features in one pass, and the Frechet distance between two Gaussians."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...files.writing import require_absent, require_writable, write_file
from ...optional import require
from .stored import read_statistics

Array = NDArray[np.float64]

LARGEST = 1e15
"""Values beyond this are damage: rounding alone would be as large as any distance that is measured."""


class RunningStatistics:
    """Mean and covariance of a stream of features, in float64 and in memory O(d^2).

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1983): with ``n`` features seen,
    mean ``mu`` and scatter ``C = sum (x - mu)(x - mu)^T``, a batch ``(m, mu_b, C_b)`` gives

        mu <- mu + (mu_b - mu) m / (n + m)
        C  <- C + C_b + (mu_b - mu)(mu_b - mu)^T n m / (n + m)

    which does not cancel when the mean is large against the spread, as the sum of squares would.

    Args:
        dimension: length ``d`` of a feature.
        ddof: 1 divides the scatter by N - 1, 0 by N.
    """

    def __init__(self, dimension: int, *, ddof: int = 1) -> None:
        self.ddof = ddof
        self.count = 0
        self.mean: Array = np.zeros(dimension)
        self._scatter: Array = np.zeros((dimension, dimension))

    def update(self, features: ArrayLike) -> None:
        """Add a batch of features ``[B, d]``.

        Raises:
            ValueError: when the shape is wrong or a value is not finite.
        """
        batch = np.asarray(features, dtype=np.float64)
        if batch.ndim != 2 or batch.shape[1] != len(self.mean):
            raise ValueError(f"features have shape {batch.shape}; (batch, {len(self.mean)}) is expected")
        if not np.abs(batch).max(initial=0) <= LARGEST**0.5:
            raise ValueError(
                "features hold NaN, infinity or values beyond 3e7, so no score can be computed: check the "
                "extractor's weights"
            )
        if not len(batch):
            return
        batch_mean = batch.mean(axis=0)
        centred, shift = batch - batch_mean, batch_mean - self.mean
        total = self.count + len(batch)
        self._scatter += centred.T @ centred
        self._scatter += np.outer(shift, shift) * (self.count * len(batch) / total)
        self.mean = self.mean + shift * (len(batch) / total)
        self.count = total

    @property
    def covariance(self) -> Array:
        """Covariance ``C / (N - ddof)``, ``[d, d]``.

        Raises:
            ValueError: with fewer than two features, which have no covariance.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} sample(s) have no covariance: at least 2 are needed")
        return self._scatter / (self.count - self.ddof)


@dataclass(frozen=True)
class FeatureStatistics:
    """Gaussian that stands for a set of samples, and where its features came from.

    Args:
        mu: mean, ``[d]``.
        sigma: covariance, ``[d, d]``.
        count: number of samples, None when not stated.
        extractor: name of the feature extractor, None when not stated.
        weights_sha256: hash of the extractor's weights, None when not stated.
        fingerprint: hash of the samples, None when not stated.
        sampling: which frames of the videos they are of; None for images.
        reading: how pixels became what the extractor was given, in words; None when not stated.
        spatial: of the spatial features that sFID is computed from, if there are any.

    Raises:
        ValueError: when the shapes do not fit, a value is not finite or absurdly large, or a variance is
            negative.
    """

    mu: Array
    sigma: Array
    count: int | None = None
    extractor: str | None = None
    weights_sha256: str | None = None
    fingerprint: str | None = None
    sampling: str | None = None
    reading: str | None = None
    spatial: FeatureStatistics | None = None

    def __post_init__(self) -> None:
        if self.mu.ndim != 1 or self.sigma.shape != (len(self.mu), len(self.mu)):
            raise ValueError(
                f"mu has shape {self.mu.shape} and sigma {self.sigma.shape}; (d,) and (d, d) are expected"
            )
        if not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            raise ValueError("mu or sigma holds NaN or infinity: compute the statistics again")
        for name, values, most in (("mu", self.mu, LARGEST**0.5), ("sigma", self.sigma, LARGEST)):
            if (largest := np.abs(values).max(initial=0)) > most:
                raise ValueError(f"{name} has values up to {largest:g}: compute the statistics again")
        if self.sigma.diagonal().min(initial=0) < 0:
            raise ValueError("sigma has a negative variance on its diagonal: compute the statistics again")

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write an npz with ``mu`` and ``sigma``, as clean-fid and ADM have it, and what else is known.

        Spatial statistics are ``mu_s`` and ``sigma_s``, as ADM calls them.

        Raises:
            ValueError: when ``path`` does not end in .npz, or exists and ``overwrite`` is false.
        """
        require_new_npz(path, overwrite=overwrite)
        known = {"n": self.count, "extractor": self.extractor, "sha256": self.weights_sha256}
        known |= {"fingerprint": self.fingerprint, "sampling": self.sampling, "reading": self.reading}
        arrays: dict[str, Any] = {key: np.asarray(value) for key, value in known.items() if value is not None}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mu, "sigma_s": self.spatial.sigma}
        buffer = io.BytesIO()
        np.savez(buffer, mu=self.mu, sigma=self.sigma, **arrays)
        write_file(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Read what ``save`` wrote, an npz of clean-fid or ADM, or a .pt of torch-fidelity.

        Raises:
            ValueError: when the file cannot be read or holds no valid statistics.
        """
        try:
            found = read_statistics(Path(path))
            for name in ("sigma", "sigma_s"):
                if name in found:
                    _require_covariance(found[name])
            return cls(
                found["mu"],
                found["sigma"],
                count=found.get("n"),
                extractor=found.get("extractor"),
                weights_sha256=found.get("sha256"),
                fingerprint=found.get("fingerprint"),
                sampling=found.get("sampling"),
                reading=found.get("reading"),
                spatial=cls(found["mu_s"], found["sigma_s"]) if {"mu_s", "sigma_s"} <= set(found) else None,
            )
        except (ValueError, KeyError, OSError, EOFError, MemoryError) as error:
            raise ValueError(f"statistics file {path} cannot be used: {error}") from error


def require_new_npz(path: str | Path, *, overwrite: bool = False) -> None:
    """Check, before hours are spent, that ``FeatureStatistics.save(path)`` will be possible.

    Raises:
        ValueError: when ``path`` does not end in .npz, cannot be written, or is there and ``overwrite`` is
            false.
    """
    if Path(path).suffix != ".npz":
        raise ValueError(f"statistics are written as npz, and {path} does not end in .npz: rename it")
    require_absent([Path(path)], overwrite=overwrite)
    require_writable(Path(path).parent)


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Return the squared Frechet (2-Wasserstein) distance between two Gaussians, the "FID" of their features.

        ||mu1 - mu2||^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))        Dowson and Landau (1982)

    With any factors ``S1 = A A^T`` and ``S2 = B B^T`` the last trace is the sum of the singular values of
    ``A^T B``: the eigenvalues of ``S1 S2`` are those of ``(A^T B)(A^T B)^T``. Pivoted Cholesky gives factors
    with as many columns as the covariance has rank, so that covariances of few images are exact and cheap,
    and nothing is ever complex. Regular covariances take the roots of the eigenvalues of ``B^T S1 B``
    instead, in less than half of the time, unless the smallest are so small that rounding shows.
    scipy's sqrtm takes several times as long, and loses half of the digits on singular products.

    Args:
        mu1, mu2: means, ``[d]``.
        sigma1, sigma2: symmetric positive semi-definite covariances, ``[d, d]``.

    Returns:
        The distance, in squared units of the features: at least 0, and exactly 0 for equal Gaussians.

    Raises:
        ValueError: when shapes differ, a value is not finite or absurdly large, or a covariance is not
            symmetric and positive semi-definite.
    """
    a = FeatureStatistics(np.asarray(mu1, dtype=np.float64), np.asarray(sigma1, dtype=np.float64))
    b = FeatureStatistics(np.asarray(mu2, dtype=np.float64), np.asarray(sigma2, dtype=np.float64))
    if a.mu.shape != b.mu.shape:
        raise ValueError(
            f"means of {len(a.mu)} and {len(b.mu)} dimensions: both must come from one extractor"
        )
    if np.array_equal(a.mu, b.mu) and np.array_equal(a.sigma, b.sigma):
        return 0.0  # rounding would leave about 1e-15 of the trace
    for sigma in (a.sigma, b.sigma):
        _require_symmetric(sigma)
    rest = np.square(a.mu - b.mu).sum() + np.trace(a.sigma) + np.trace(b.sigma)
    distance = float(rest - 2 * _trace_of_root(a.sigma, b.sigma))
    if distance < -1e-6 * rest:  # of covariances it is at least 0
        raise ValueError(f"the distance comes out as {distance:g}: {_NO_COVARIANCE}")
    return max(distance, 0.0)


def _trace_of_root(sigma1: Array, sigma2: Array) -> float:
    """Return ``tr((S1 S2)^(1/2))``."""
    a, b = _regular_factor(sigma1), _regular_factor(sigma2)
    if a is None or b is None:
        return float(np.linalg.svd(_factor(sigma1).T @ _factor(sigma2), compute_uv=False).sum())
    if min(_pivot_ratio(a), _pivot_ratio(b)) > 1e-5:
        trmm = require("scipy.linalg.blas").dtrmm
        product = trmm(1.0, b, trmm(1.0, b, sigma1, side=1, lower=1), lower=1, trans_a=1)
        eigenvalues = require("scipy.linalg").eigvalsh(product, check_finite=False)
        # Each is off by some 1e-16 of the largest, so that these roots are off by 1e-9 at most.
        if eigenvalues[0] > 1e-13 * eigenvalues[-1]:
            return float(np.sqrt(eigenvalues).sum())
    return float(np.linalg.svd(a.T @ b, compute_uv=False).sum())


def _pivot_ratio(factor: Array) -> float:
    """Return the smallest pivot of a Cholesky factor over the largest."""
    pivots = np.square(factor.diagonal())
    return float(pivots.min() / pivots.max())


def _regular_factor(sigma: Array) -> Array | None:
    """Return the Cholesky factor, None when the matrix is singular or rounding makes it so."""
    try:
        lower = np.linalg.cholesky(sigma).astype(np.float64, copy=False)
    except np.linalg.LinAlgError:
        return None
    return lower if _pivot_ratio(lower) > 1e-12 else None


def _require_covariance(sigma: Array) -> None:
    """Check that a matrix is symmetric and positive semi-definite.

    Raises:
        ValueError: when it is not.
    """
    shaped = FeatureStatistics(np.zeros(len(sigma)), sigma)  # of finite values, and square
    _require_symmetric(shaped.sigma)
    if _regular_factor(sigma) is None:
        _factor(sigma)


def _require_symmetric(sigma: Array) -> None:
    if not np.allclose(sigma, sigma.T, rtol=0, atol=1e-8 * float(np.abs(sigma).max())):
        raise ValueError("a covariance is not symmetric: compute the statistics again")


_NO_COVARIANCE = "a covariance is not positive semi-definite; compute the statistics again"


def _factor(sigma: Array) -> Array:
    """Return ``A`` ``[d, rank]`` with ``sigma = A A^T``, by pivoted Cholesky (LAPACK pstrf).

    Raises:
        ValueError: when there is none, as ``sigma`` is not positive semi-definite.
    """
    if not sigma.any():
        return np.zeros((len(sigma), 0))
    lower, pivots, rank, _ = require("scipy.linalg.lapack").dpstrf(sigma, lower=1)
    factor = np.zeros((len(sigma), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    left = float(np.abs(sigma - factor @ factor.T).max())
    if left > 1e-4 * float(sigma.diagonal().max()):  # statistics in float32 leave some 1e-6
        raise ValueError(f"{_NO_COVARIANCE} ({left:g} of {sigma.diagonal().max():g} has no factor)")
    return factor
