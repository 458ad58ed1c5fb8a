"""The paper's equations in O(N^2) and float64. Read it to know what MHLA is; never optimise it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .composite import counted
from .features import RotaryEmbedding, apply_rotary_emb, check_arguments, check_eps, phi, turn_all
from .layout import BlockLayout, Margin
from .norms import Norms


def mhla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    layout: BlockLayout,
    *,
    key_layout: BlockLayout | None = None,
    feature_map: str = "relu",
    normalizer: str = "paper",
    rotary_emb: RotaryEmbedding | None = None,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
    norms: Norms | None = None,
) -> Tensor:
    """MHLA as a dense attention matrix (equations 3-5): the measure of every fast path.

    ``A[t, s] = W[b(t), b(s)] (phi(q_t) . phi(k_s))``; the rows of A are divided by their sums; o = A v.
    Arguments, errors and conventions are those of :func:`mhla_diffusion.ops.mhla`.

    Returns:
        ``[B, H, N, d]``, float64.
    """
    check_arguments(
        q, k, v, mixing, layout, key_layout,
        feature_map=feature_map, normalizer=normalizer, rotary_emb=rotary_emb, key_mask=key_mask,
    )  # fmt: skip
    check_eps(eps)
    q, k, v, mixing = (x.double() for x in (q, k, v, mixing))
    v, k = counted(v, key_mask), counted(k, key_mask)
    norms = (norms or Norms()).double()
    q, k = norms.before(q, k)
    q, k = phi(q, feature_map, eps=eps), counted(phi(k, feature_map, eps=eps), key_mask)
    block, key_block = (x.block_index(q.device) for x in (layout, key_layout or layout))
    weights = mixing[..., block, :][..., key_block]  # [N, N_k] or [H, N, N_k]
    rotary_emb = rotary_emb and turn_all(rotary_emb, layout.num_tokens, layout.extra)
    numerator, denominator = _dense(q, k, v, weights, rotary_emb)
    if normalizer == "none":
        return norms.behind(numerator, numerator.dtype)
    if normalizer == "official":
        denominator = _official_denominator(q, k, mixing, layout)
    return norms.behind(numerator / torch.where(denominator == 0, 1.0, denominator), numerator.dtype)


def mhla_local_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    layout: BlockLayout,
    *,
    window: tuple[Tensor, Tensor],
    weight: Tensor,
    form: str,
    feature_map: str = "relu",
    rotary_emb: RotaryEmbedding | None = None,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
    margin: Margin = 0,
    chosen: Tensor | None = None,
) -> Tensor:
    """MHLA with a softmax window as dense attention: the measure of :func:`mhla_diffusion.ops.mhla_local`.

    Returns:
        ``[B, H, N, d]``, float64.
    """
    options: dict[str, Any] = {"feature_map": feature_map, "key_mask": key_mask, "eps": eps}
    block = layout.block_index(q.device)
    own = (block[:, None] == block).double()
    own[layout.grid_tokens, layout.grid_tokens] = _near(layout, margin).to(own)
    if chosen is not None:
        own = own + (chosen[..., None] == block).double().sum(-2)  # [B, H, N, N]
    window_q, window_k = (x.double() for x in window)
    scores = window_q @ window_k.mT / math.sqrt(window_q.shape[-1])
    own = own if key_mask is None else own * key_mask[:, None, None, :]
    highest = scores.detach().masked_fill(own == 0, -math.inf).amax(-1, keepdim=True)
    shift = highest.masked_fill(highest == -math.inf, 0)  # which no quotient sees, and float64 has room for
    weight = weight.double()[:, None, None]
    v = counted(v.double(), key_mask)
    if form == "gate":
        near = (scores - shift).masked_fill(own == 0, -math.inf).exp() * own
        sums = near.sum(-1, keepdim=True)
        gate, softmax = weight.sigmoid(), near @ v / torch.where(sums == 0, 1.0, sums)
        far = mhla_reference(q, k, v, mixing, layout, rotary_emb=rotary_emb, **options)
        return gate * softmax + (1 - gate) * far
    others = mixing.double() * (1 - torch.eye(layout.num_blocks, dtype=torch.float64, device=q.device))
    ones = torch.ones_like(v[..., :1])
    options["normalizer"] = "none"
    far = mhla_reference(q, k, v, others, layout, rotary_emb=rotary_emb, **options)
    far_sums = mhla_reference(q, k, ones, others, layout, **options)
    shift = shift.where(far_sums == 0, shift.clamp_min(0))  # the others are no larger for it
    near = (scores - shift).masked_fill(own == 0, -math.inf).exp() * own
    scale = (weight - shift.clamp_min(0)).exp()
    sums = near.sum(-1, keepdim=True) + scale * far_sums
    return (near @ v + scale * far) / torch.where(sums == 0, 1.0, sums)


def _near(layout: BlockLayout, margin: Margin) -> Tensor:
    """Which tokens of the grid lie in the block of a token or at most a margin from it, bool ``[N, N]``."""
    block = BlockLayout(layout.grid, layout.blocks).block_index()
    same = block[:, None] == block
    axes = torch.meshgrid(*(torch.arange(n) for n in layout.grid), indexing="ij")
    place = torch.stack(axes, -1).flatten(0, -2)  # [N, axes]
    margins = torch.tensor(layout.margins(margin))
    offset = (place[:, None] - place).abs()  # [N, N, axes]
    # Along each axis the distance of a token from a block is that from the nearest token of it.
    distance = torch.stack([offset[members].amin(0) for members in same])
    return (distance <= margins).all(-1)


def mhla_causal_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    block_size: int,
    *,
    feature_map: str = "relu",
    normalizer: str = "paper",
    rotary_emb: RotaryEmbedding | None = None,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Causal MHLA as a dense attention matrix: that of :func:`mhla_reference`, zero where s > t.

    Arguments and conventions are those of :func:`mhla_diffusion.ops.mhla_causal`.

    Returns:
        ``[B, H, N, d]``, float64.
    """
    q, k, v, mixing = (x.double() for x in (q, k, v, mixing))
    v, k = counted(v, key_mask), counted(k, key_mask)
    q, k = phi(q, feature_map, eps=eps), counted(phi(k, feature_map, eps=eps), key_mask)
    block = torch.arange(q.shape[2], device=q.device) // block_size
    weights = mixing[..., block, :][..., block].tril()
    numerator, denominator = _dense(q, k, v, weights, rotary_emb)
    return numerator if normalizer == "none" else numerator / torch.where(denominator == 0, 1.0, denominator)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, rotary_emb: RotaryEmbedding | None
) -> tuple[Tensor, Tensor]:
    """Numerators ``[B, H, N, d]`` and denominators ``[B, H, N, 1]`` of features q and k."""
    positive = weights * (q @ k.transpose(-1, -2))  # [B, H, N, N_k]
    if rotary_emb is None:
        numerator = positive @ v
    else:
        rotated = apply_rotary_emb(q, rotary_emb) @ apply_rotary_emb(k, rotary_emb).transpose(-1, -2)
        numerator = (weights * rotated) @ v
    return numerator, positive.sum(-1, keepdim=True)


def _official_denominator(q: Tensor, k: Tensor, mixing: Tensor, layout: BlockLayout) -> Tensor:
    """The public reference code's denominator, ``[B, H, N, 1]``.

    A deviation from the paper, kept for checkpoints trained with it: the query of block b at place p meets
    the key sum of its own block, and those products are mixed over the blocks at the same place p,
    ``den[i, p] = sum_b W[i, b] (phi(q)[b, p] . z_b)``. With v = 1 the output is therefore not 1.
    """
    q, k = layout.pack(q), layout.pack(k)  # [B, H, M, n, d]
    own = torch.einsum("bhmpd,bhmsd->bhmp", q, k)
    return layout.unpack((mixing @ own)[..., None])
