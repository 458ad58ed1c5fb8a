"""Hedgehog, the learned feature map (Zhang et al. 2024, arXiv 2402.04347)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Hedgehog(nn.Module):
    """Feature map ``[softmax(W x), softmax(-W x)]`` over the channels of a head, with a W for each head.

    It stands in front of the operator, whose ``"relu"`` leaves positive features as they are, plus eps.

    Args:
        heads, head_dim: H and d.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, head_dim, head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start from the identity."""
        self.weight.copy_(torch.eye(self.weight.shape[-1]).expand_as(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, N, d]`` to ``[B, H, N, 2 d]``, positive."""
        x = x @ self.weight.mT.to(x.dtype)
        return torch.cat((x.softmax(-1), (-x).softmax(-1)), -1)
