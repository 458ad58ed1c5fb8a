"""What the tests of every room share."""

from __future__ import annotations

import os
from collections.abc import Callable

# Nothing may reach for a hub; set before huggingface_hub is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import Tensor

# Relative RMS error that a result in this dtype may have against the float64 reference.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 1e-3,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """``assert_close(actual, expected, dtype=None)``: relative RMS error within the dtype's tolerance."""

    def check(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
        assert actual.shape == expected.shape
        difference = (actual.double() - expected.double()).square().mean().sqrt()
        scale = expected.double().square().mean().sqrt()
        assert scale > 0, "an expected value of zero proves nothing"
        error = (difference / scale).item()
        assert error <= TOLERANCE[dtype or actual.dtype], f"relative RMS error {error:.2e}"

    return check
