"""What happens to queries and keys before they are summed: feature map, rotary embedding, checks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import BlockLayout

FEATURE_MAPS = ("relu", "elu", "softmax")
NORMALIZERS = ("paper", "official", "none")

RotaryEmbedding = tuple[Tensor, Tensor]


def phi(x: Tensor, feature_map: str, *, eps: float) -> Tensor:
    """The positive feature map: ``relu(x) + eps``, ``elu(x) + 1`` or a softmax over the last axis."""
    if feature_map == "relu":
        return F.relu(x) + eps
    if feature_map == "elu":
        return F.elu(x) + 1
    return x.softmax(-1)


def apply_rotary_emb(x: Tensor, rotary_emb: RotaryEmbedding) -> Tensor:
    """Rotate the pairs ``(x[..., 2i], x[..., 2i + 1])``.

    Args:
        x: ``[..., N, d]``.
        rotary_emb: cosines and sines, each ``[N, d / 2]`` or broadcastable to ``[..., N, d / 2]``.
    """
    cos, sin = (table.to(x.dtype) for table in rotary_emb)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    layout: BlockLayout,
    *,
    feature_map: str,
    normalizer: str,
    rotary_emb: RotaryEmbedding | None,
    key_mask: Tensor | None,
) -> None:
    """Refuse what :func:`mhla` cannot compute, with a ValueError that names the value and the remedy."""
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map {feature_map!r} is not one of {', '.join(FEATURE_MAPS)}")
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer {normalizer!r} is not one of {', '.join(NORMALIZERS)}")
    if q.ndim != 4 or q.shape != k.shape or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            "q, k and v must be [B, H, N, d] with the same B, H, N (q and k also d), got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    heads, tokens, d = q.shape[1:]
    if tokens != layout.num_tokens:
        raise ValueError(
            f"q, k and v hold {tokens} tokens, but the grid {layout.grid} has {layout.num_tokens}"
        )
    blocks = layout.num_blocks
    if tuple(mixing.shape) not in {(blocks, blocks), (heads, blocks, blocks)}:
        raise ValueError(
            f"mixing must be [M, M] or [H, M, M] with M = {blocks} (blocks {layout.blocks}) and H = {heads}, "
            f"got {tuple(mixing.shape)}"
        )
    if normalizer == "official" and not layout.is_even:
        raise ValueError(
            f"normalizer 'official' pairs tokens by their place inside a block and needs equal blocks, but "
            f"the grid {layout.grid} is not a multiple of the blocks {layout.blocks}; use normalizer='paper'"
        )
    if rotary_emb is not None:
        for table in rotary_emb:
            if table.ndim < 2 or table.shape[-2:] != (tokens, d // 2) or d % 2:
                raise ValueError(
                    f"rotary_emb must be (cos, sin), each [..., N, d / 2] = [..., {tokens}, {d // 2}] with d "
                    f"even, got {tuple(table.shape)} at d = {d}"
                )
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (len(q), tokens)):
        raise ValueError(
            f"key_mask must be a bool tensor [B, N] = [{len(q)}, {tokens}], true where a key counts, got "
            f"{key_mask.dtype} {tuple(key_mask.shape)}"
        )
