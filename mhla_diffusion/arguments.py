"""Arguments that are numbers, refused at once where torch or numpy would refuse them late."""

from __future__ import annotations

import math
from typing import Any

MAX_SEED = 2**63 - 1  # of torch, for negative ones are others in disguise
MAX_NUMPY_SEED = 2**32 - 1


def is_whole(value: Any) -> bool:
    """Tell whether a value is a whole number, of Python, numpy or torch."""
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0


def require_positive(**counts: Any) -> None:
    """Check arguments that count something; None where one is not given.

    Raises:
        ValueError: for one that is no whole number, or below 1.
    """
    for name, value in counts.items():
        if value is None:
            continue
        if not is_whole(value):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def require_seed(seed: Any, name: str = "seed", *, most: int = MAX_SEED) -> None:
    """Check a seed of torch's or numpy's generators.

    Raises:
        ValueError: for one that is no whole number from 0 to ``most``, by default torch's largest.
    """
    if not (is_whole(seed) and 0 <= seed <= most):
        raise ValueError(f"{name} must be a whole number from 0 to {most}, got {seed!r}")


def require_finite(**numbers: Any) -> None:
    """Check arguments that may be numbers: NaN passes every bound.

    Raises:
        ValueError: for NaN or infinity.
    """
    for name, value in numbers.items():
        if hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0 and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")
