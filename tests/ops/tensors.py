"""Tensors for tests of kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def amid_nan(
    batch: int,
    heads: int,
    tokens: int,
    channels: int,
    dtype: str = "float32",
    *,
    heads_inside: bool = False,
    channels_apart: bool = False,
) -> Tensor:
    """Normal numbers ``[B, H, N, d]`` that lie amid NaN, in one of three orders in memory."""
    order = {
        heads_inside: (batch, tokens, heads, channels),
        channels_apart: (batch, heads, channels, tokens),
    }
    shape = order.get(True, (batch, heads, tokens, channels))
    amid = torch.full([size + 2 for size in shape], torch.nan, dtype=getattr(torch, dtype))
    x = amid[tuple(slice(1, -1) for _ in shape)]
    x.copy_(torch.randn(shape))
    return x.transpose(1, 2) if heads_inside else x.mT if channels_apart else x
