"""Multi-Head Linear Attention in linear time."""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch import Tensor

from .autocast import as_autocast, without_autocast
from .composite import features_of
from .dispatch import has_kernels
from .features import Features, RotaryEmbedding, check_arguments
from .layout import BlockLayout
from .norms import Norms
from .operators import fused, in_transform, read, summarize
from .rotary import rotary_table


def mhla(
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
    dtype: torch.dtype | None = None,
    norms: Norms | None = None,
) -> Tensor:
    """Multi-Head Linear Attention, non-causal (arXiv 2601.07832, equations 3-5).

    Each block b keeps a summary of its own tokens, ``S_b = sum_j phi(k_j) v_j^T`` and
    ``z_b = sum_j phi(k_j)``. For query block i they are mixed anew, ``S^_i = sum_b W[i, b] S_b`` and
    ``z^_i`` likewise, and a query of that block reads ``o = (phi(q)^T S^_i) / (phi(q)^T z^_i)``. Time
    O(N d^2 + M^2 d^2), state O(M d^2).

    Sums and denominators are taken in float32 (float64 for float64 inputs), also under autocast, which casts
    q, k and v as it does for ``F.scaled_dot_product_attention``.
    Memory beyond inputs and output is that of the summaries, twice, and of a few tiles.

    Args:
        q, k: ``[B, H, N, d]`` in grid order, before the feature map; extra tokens before or after.
        v: ``[B, H, N, d_v]``.
        mixing: W, ``[M, M]``, one per head ``[H, M, M]``, or per sample and head ``[B, H, M, M]``; row i is
            how query block i weighs the key blocks.
        layout: the grid, its blocks, and whether there are extra tokens: one more block, the last.
        key_layout: those of the keys where they are others than the queries (cross-attention): k and v are
            ``[B, H, N_k, ...]`` then, and mixing ``[(H,) M, M_k]``.
        feature_map: ``"relu"`` (plus eps), ``"elu"`` (plus 1) or ``"softmax"`` over d.
        normalizer: ``"paper"``; ``"official"``, the denominator of the public reference code (see
            ``reference._official_denominator``); or ``"none"``, for a norm behind the operator.
        rotary_emb: cosines and sines, each ``[..., N, d / 2]``, for interleaved pairs. They turn the
            features in the numerator alone: a rotated denominator is not positive. Tables of the tokens on
            the grid alone leave extra ones as they are.
        key_mask: bool ``[B, N_k]``, true where a key counts. A query that sees no key at all gets 0.
        eps: added by the relu feature map.
        dtype: of the output, by default that of v. Without a denominator outputs are sums over all tokens,
            which may be too large for float16 (and become its largest number then): ask for float32, and norm
            them before they are narrowed.
        norms: norms of q, k and the output, and a gate. On GPUs, under ``torch.no_grad``, the kernels apply
            them to what they hold, and q, k and the output pass through memory once; but for keys of another
            grid and normalizer ``"official"``, and in ``torch.export``.

    Returns:
        ``[B, H, N, d_v]`` in ``dtype``, with the axes in memory in the order of those of q.

    Raises:
        ValueError: for shapes, names or masks that do not fit together.
    """
    check_arguments(
        q, k, v, mixing, layout, key_layout,
        feature_map=feature_map, normalizer=normalizer, rotary_emb=rotary_emb, key_mask=key_mask,
    )  # fmt: skip
    q, k, v = as_autocast(q, k, v)
    dtype = dtype or v.dtype
    if norms is not None:
        norms.check(q, k, v)
    rotary = rotary_table(rotary_emb, layout.num_tokens, layout.extra)
    features = Features(feature_map, eps, normalizer == "paper", rotary)
    norms = norms or Norms()
    whole = norms.any and key_layout is None and normalizer != "official"
    if whole and _is_fused(q, k, v):
        return fused(q, k, v, mixing, layout, dataclasses.replace(features, mask=key_mask), norms, dtype)
    q, k = norms.before(q, k)
    tensors, layouts = (q, k, v, mixing), (layout, key_layout or layout)
    between = torch.promote_types(v.dtype, torch.float32) if normalizer == "official" else dtype
    between = norms.dtype_between(between, normalized=normalizer != "none")
    out, _ = attend(*tensors, *layouts, features, key_mask, between)
    if normalizer == "official":
        out = out / _official_denominator(q, k, mixing, layout, features, key_mask)
    return norms.behind(out, dtype)


def _is_fused(*tensors: Tensor) -> bool:
    """Whether kernels take these tensors with norms and a gate: these have no gradient then."""
    if torch.is_grad_enabled() or in_transform() or torch.compiler.is_exporting():
        return False
    return has_kernels(tensors[0].device, *[(x.dtype, operator.index(x.shape[-1])) for x in tensors])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    layout: BlockLayout,
    key_layout: BlockLayout,
    features: Features,
    key_mask: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Both halves of the operator, on arguments that were checked.

    Returns:
        The output ``[B, H, N, d_v]`` in ``dtype``, and its denominators, see
        :func:`mhla_diffusion.ops.operators.read`.
    """
    key_features = features if key_mask is None else dataclasses.replace(features, mask=key_mask)
    return read(q, summarize(k, v, key_layout, key_features), mixing, layout, features, dtype)


def _official_denominator(
    q: Tensor, k: Tensor, mixing: Tensor, layout: BlockLayout, features: Features, key_mask: Tensor | None
) -> Tensor:
    """See :func:`mhla_diffusion.ops.reference._official_denominator`; ``[B, H, N, 1]``."""
    features = dataclasses.replace(features, rotary=None)
    with without_autocast(q):
        q, _ = features_of(q, features)
        k, _ = features_of(k, dataclasses.replace(features, mask=key_mask))
        sums = layout.block_sums(k, k.dtype)  # [B, H, M, d]
        own = (layout.pack(q) @ sums[..., None]).squeeze(-1)  # [B, H, M, n]
        denominator = layout.unpack((mixing.to(own.dtype) @ own)[..., None])
    return torch.where(denominator == 0, 1.0, denominator)
