"""Tiny models with weights that are nowhere zero, so that every part of them shows in the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from mhla_diffusion import MHLADiTTransformer2DModel

TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
}


def _randomize(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("processor.mixing"):
            nn.init.uniform_(parameter, 0.1, 0.9)
        else:
            nn.init.normal_(parameter, std=0.2)


@pytest.fixture
def make_model() -> Callable[..., MHLADiTTransformer2DModel]:
    """``make_model(**settings)``: an 8 x 8 DiT (4 x 4 tokens, 4 blocks) in eval mode."""

    def make(**settings: Any) -> MHLADiTTransformer2DModel:
        model = MHLADiTTransformer2DModel(**{**TINY, "mhla_config": {"blocks": 4}, **settings})
        _randomize(model)
        return model.eval()

    return make


@pytest.fixture
def make_stock() -> Callable[..., DiTTransformer2DModel]:
    """``make_stock(**settings)``: the same size from diffusers, in eval mode."""

    def make(**settings: Any) -> DiTTransformer2DModel:
        model = DiTTransformer2DModel(**{**TINY, **settings})
        _randomize(model)
        return model.eval()

    return make


@pytest.fixture
def make_inputs() -> Callable[..., dict[str, Tensor]]:
    """``make_inputs(size)``: the arguments of a forward call on two images, drawn from their own seed."""

    def make(size: tuple[int, int] = (8, 8), dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(sum(size))
        return {
            "hidden_states": torch.randn(2, 3, *size, generator=generator).to(dtype),
            "timestep": torch.tensor([7, 900]),
            "class_labels": torch.tensor([1, 5]),
        }

    return make
