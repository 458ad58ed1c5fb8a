"""Mean and covariance of features in one pass, and the Frechet distance between two Gaussians."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...files.writing import require_absent, write_file
from ...optional import require

Array = NDArray[np.float64]


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
        if not np.isfinite(batch).all():
            raise ValueError(
                "features hold NaN or infinity, so no score can be computed: check the extractor's weights"
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
        spatial: of the spatial features that sFID is computed from, if there are any.

    Raises:
        ValueError: when the shapes do not fit or a value is not finite.
    """

    mu: Array
    sigma: Array
    count: int | None = None
    extractor: str | None = None
    weights_sha256: str | None = None
    fingerprint: str | None = None
    sampling: str | None = None
    spatial: FeatureStatistics | None = None

    def __post_init__(self) -> None:
        if self.mu.ndim != 1 or self.sigma.shape != (len(self.mu), len(self.mu)):
            raise ValueError(
                f"mu has shape {self.mu.shape} and sigma {self.sigma.shape}; (d,) and (d, d) are expected"
            )
        if not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            raise ValueError("mu or sigma holds NaN or infinity: compute the statistics again")

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write an npz with ``mu`` and ``sigma``, as clean-fid and ADM have it, and what else is known.

        Spatial statistics are ``mu_s`` and ``sigma_s``, as ADM calls them.

        Raises:
            ValueError: when ``path`` does not end in .npz, or exists and ``overwrite`` is false.
        """
        require_new_npz(path, overwrite=overwrite)
        known = {"n": self.count, "extractor": self.extractor, "sha256": self.weights_sha256}
        known |= {"fingerprint": self.fingerprint, "sampling": self.sampling}
        arrays: dict[str, Any] = {key: np.asarray(value) for key, value in known.items() if value is not None}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mu, "sigma_s": self.spatial.sigma}
        buffer = io.BytesIO()
        np.savez(buffer, mu=self.mu, sigma=self.sigma, **arrays)
        write_file(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Read what ``save`` wrote, or an npz of clean-fid or ADM (``mu`` and ``sigma`` alone).

        Raises:
            ValueError: when the file cannot be read or holds no valid statistics.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                known = {
                    key: file[key].item()
                    for key in ("n", "extractor", "sha256", "fingerprint", "sampling")
                    if key in file
                }
                arrays = {
                    key: file[key].astype(np.float64)
                    for key in ("mu", "sigma", "mu_s", "sigma_s")
                    if key in file or "_" not in key
                }
            return cls(
                arrays["mu"],
                arrays["sigma"],
                count=known.get("n"),
                extractor=known.get("extractor"),
                weights_sha256=known.get("sha256"),
                fingerprint=known.get("fingerprint"),
                sampling=known.get("sampling"),
                spatial=cls(arrays["mu_s"], arrays["sigma_s"])
                if {"mu_s", "sigma_s"} <= set(arrays)
                else None,
            )
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"statistics file {path} cannot be used: {error}") from error


def require_new_npz(path: str | Path, *, overwrite: bool = False) -> None:
    """Check, before hours are spent, that ``FeatureStatistics.save(path)`` will be possible.

    Raises:
        ValueError: when ``path`` does not end in .npz, or exists and ``overwrite`` is false.
    """
    if Path(path).suffix != ".npz":
        raise ValueError(f"statistics are written as npz, and {path} does not end in .npz: rename it")
    require_absent([Path(path)], overwrite=overwrite)


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
        ValueError: when shapes differ, a value is not finite or a covariance is not symmetric.
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
    overlap = _trace_of_root(a.sigma, b.sigma)
    return max(float(rest - 2 * overlap), 0.0)


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


def _require_symmetric(sigma: Array) -> None:
    if not np.allclose(sigma, sigma.T, rtol=0, atol=1e-8 * float(np.abs(sigma).max())):
        raise ValueError("a covariance is not symmetric: compute the statistics again")


def _factor(sigma: Array) -> Array:
    """Return ``A`` ``[d, rank]`` with ``sigma = A A^T``, by pivoted Cholesky (LAPACK pstrf)."""
    if not sigma.any():
        return np.zeros((len(sigma), 0))
    lower, pivots, rank, _ = require("scipy.linalg.lapack").dpstrf(sigma, lower=1)
    factor = np.zeros((len(sigma), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor
