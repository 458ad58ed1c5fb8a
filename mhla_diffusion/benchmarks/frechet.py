"""The Frechet distance beside scipy's sqrtm."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..evaluation import frechet_distance
from ..files.text import markdown_table
from ..optional import require
from .shared import check_at_least, machine


def frechet(dimension: int = 2048, samples: int = 10_000) -> str:
    """Seconds for a Frechet distance beside scipy's sqrtm, on covariances of different kinds.

    Args:
        dimension: of the features.
        samples: of each Gaussian; a quarter of ``dimension`` where the covariance is to be singular.

    Returns:
        A table in Markdown.

    Raises:
        ValueError: for a number that is too small.
        ImportError: without the ``eval`` extra.
    """
    check_at_least(2, samples=samples)
    check_at_least(8, dimension=dimension)
    generator = np.random.default_rng(0)
    flat, decaying = np.ones(dimension), np.logspace(0, -3, dimension)
    cases = {
        f"equal variances, {samples:,} samples": (flat, samples),
        f"variances over six decades, {samples:,} samples": (decaying, samples),
        f"singular, {dimension // 4:,} samples": (flat, dimension // 4),
    }
    lines = [["covariances", "seconds", "sqrtm, seconds", "times as fast", "relative difference"]]
    for name, (scale, count) in cases.items():
        moments: list[NDArray[np.float64]] = []
        for _ in range(2):
            features = generator.standard_normal((count, dimension)) * scale
            moments += [features.mean(axis=0), np.cov(features, rowvar=False)]
        start = time.perf_counter()
        value = frechet_distance(*moments)
        middle = time.perf_counter()
        expected = _by_sqrtm(*moments)
        ours, theirs = middle - start, time.perf_counter() - middle
        lines.append(
            [
                name, f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f} x",
                f"{abs(value - expected) / expected:.0e}",
            ]
        )  # fmt: skip
    return f"{machine('cpu')}, {dimension:,} dimensions\n\n{markdown_table(lines)}"


def _by_sqrtm(mu1: Any, sigma1: Any, mu2: Any, sigma2: Any) -> float:
    root = require("scipy.linalg").sqrtm(sigma1 @ sigma2)
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real)
