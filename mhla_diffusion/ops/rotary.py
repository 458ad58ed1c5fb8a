"""Tables of positions as the operator reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from .features import RotaryEmbedding, turn_all
from .operators import is_watched


def rotary_table(
    rotary_emb: RotaryEmbedding | None, tokens: int | None = None, extra: tuple[int, int] | None = None
) -> Tensor | None:
    """Return cosine and sine of each pair side by side, ``[..., N, d]``: as they lie where they do, as in a
    complex number, else a copy.

    Args:
        rotary_emb: cosines and sines, ``[..., N, d / 2]`` each.
        tokens, extra: number of all tokens and of the extra ones before and after those of the grid, where
            tables may be of the grid alone.
    """
    if rotary_emb is None:
        return None
    cos, sin = rotary_emb if tokens is None else turn_all(rotary_emb, tokens, extra)
    if _lie_side_by_side(cos, sin):
        return cos.as_strided((*cos.shape[:-1], 2 * cos.shape[-1]), (*cos.stride()[:-1], 1))
    return torch.stack((cos, sin), -1).flatten(-2)


def _lie_side_by_side(cos: Tensor, sin: Tensor) -> bool:
    """Whether each sine stands behind its cosine in memory, with the sign that it has there."""
    if is_watched((cos, sin)) or cos.shape != sin.shape or cos.dtype != sin.dtype:
        return False
    if cos.stride() != sin.stride() or cos.stride(-1) != 2 or cos.is_neg() or sin.is_neg():
        return False
    one = cos.untyped_storage().data_ptr() == sin.untyped_storage().data_ptr()
    return bool(one and sin.storage_offset() == cos.storage_offset() + 1)
