"""Every test that asks for a ``case`` runs for every backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from mhla_diffusion import MHLADiTTransformer2DModel

from .cases import CASES, Case


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def make_model() -> Callable[..., MHLADiTTransformer2DModel]:
    """``make_model(**settings)``: an 8 x 8 DiT (4 x 4 tokens, 4 blocks) in eval mode."""
    return lambda **settings: CASES["DiT"].make(**{"mhla_config": {"blocks": 4}, **settings})


@pytest.fixture
def make_stock() -> Callable[..., DiTTransformer2DModel]:
    """``make_stock(**settings)``: the same size from diffusers, in eval mode."""
    return CASES["DiT"].stock


@pytest.fixture
def make_inputs() -> Callable[..., dict[str, Tensor]]:
    """``make_inputs(size)``: the arguments of a forward call on two images, drawn from their own seed."""

    def make(size: tuple[int, int] = (8, 8), dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(sum(size))
        return {
            "hidden_states": torch.randn(2, 3, *size, generator=generator).to(dtype),
            "timestep": torch.tensor([7, 900]),
            "class_labels": torch.tensor([1, 5]),
        }

    return make
