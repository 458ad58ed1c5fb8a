"""Multi-Head Linear Attention in linear time."""

from __future__ import annotations

import torch
from torch import Tensor

from .features import RotaryEmbedding, apply_rotary_emb, check_arguments, phi
from .layout import BlockLayout


def mhla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    layout: BlockLayout,
    *,
    feature_map: str = "relu",
    normalizer: str = "paper",
    rotary_emb: RotaryEmbedding | None = None,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Multi-Head Linear Attention, non-causal (arXiv 2601.07832, equations 3-5).

    Each block b keeps a summary of its own tokens, ``S_b = sum_j phi(k_j) v_j^T`` and
    ``z_b = sum_j phi(k_j)``. For query block i they are mixed anew, ``S^_i = sum_b W[i, b] S_b`` and
    ``z^_i`` likewise, and a query of that block reads ``o = (phi(q)^T S^_i) / (phi(q)^T z^_i)``. Time
    O(N d^2 + M^2 d^2), state O(M d^2).

    Sums and denominators are taken in float32 (float64 for float64 inputs), also under autocast.

    Args:
        q, k: ``[B, H, N, d]`` in grid order, before the feature map.
        v: ``[B, H, N, d]``.
        mixing: W, ``[M, M]`` or one per head ``[H, M, M]``; row i is how query block i weighs the key blocks.
        layout: the grid and its blocks.
        feature_map: ``"relu"`` (plus eps), ``"elu"`` (plus 1) or ``"softmax"`` over d.
        normalizer: ``"paper"``; ``"official"``, the denominator of the public reference code (see
            ``reference._official_denominator``); or ``"none"``, for a norm behind the operator.
        rotary_emb: cosines and sines, each ``[..., N, d / 2]``, for interleaved pairs. They turn the
            features in the numerator alone: a rotated denominator is not positive.
        key_mask: bool ``[B, N]``, true where a key counts. A query that sees no key at all gets 0.
        eps: added by the relu feature map.

    Returns:
        ``[B, H, N, d]`` in the dtype of v.

    Raises:
        ValueError: for shapes, names or masks that do not fit together.
    """
    check_arguments(
        q, k, v, mixing, layout,
        feature_map=feature_map, normalizer=normalizer, rotary_emb=rotary_emb, key_mask=key_mask,
    )  # fmt: skip
    out_dtype = v.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, mixing = (x.to(dtype) for x in (q, k, v, mixing))
        q, k = phi(q, feature_map, eps=eps), phi(k, feature_map, eps=eps)
        if key_mask is not None:
            k = k * key_mask[:, None, :, None]
        out = _mixed_attention(q, k, v, mixing, layout, normalizer, rotary_emb)
    return out.to(out_dtype)


def _mixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    layout: BlockLayout,
    normalizer: str,
    rotary_emb: RotaryEmbedding | None,
) -> Tensor:
    """Steps 1-3 on features; the zeros that pad ragged blocks add nothing to any sum."""
    q_blocks, k_blocks, v_blocks = layout.pack(q), layout.pack(k), layout.pack(v)  # [B, H, M, n, d]
    if rotary_emb is None:
        q_rotated, k_rotated = q_blocks, k_blocks
    else:
        q_rotated, k_rotated = (layout.pack(apply_rotary_emb(x, rotary_emb)) for x in (q, k))
    summaries = k_rotated.transpose(-1, -2) @ v_blocks  # [B, H, M, d, d]
    # Expanded: a matrix of its own for each summary would make matmul transpose all summaries first.
    mixing = mixing.expand(*summaries.shape[:2], -1, -1)
    mixed = (mixing @ summaries.flatten(-2)).unflatten(-1, summaries.shape[-2:])
    out = q_rotated @ mixed  # [B, H, M, n, d]
    if normalizer != "none":
        key_sums = k_blocks.sum(-2)  # [B, H, M, d]
        if normalizer == "paper":
            denominator = q_blocks @ (mixing @ key_sums)[..., None]
        else:
            denominator = (mixing @ (q_blocks @ key_sums[..., None]).squeeze(-1))[..., None]
        # Zero where a query sees no key (all masked, or a row of W that is all zero): 0 / 1, not NaN.
        out = out / torch.where(denominator == 0, 1.0, denominator)
    return layout.unpack(out)
