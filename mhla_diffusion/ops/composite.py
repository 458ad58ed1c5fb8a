"""The two halves in operations of torch: slower, differentiable any number of times, and open to other forms.

The causal form is built of these parts; the fast path takes them for gradients of gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .features import Features, apply_rotary_emb, phi
from .layout import BlockLayout


def summarize(k: Tensor, v: Tensor, layout: BlockLayout, features: Features) -> Tensor:
    """See :func:`mhla_diffusion.ops.tiled.summarize`."""
    plain, rotated = features_of(k, features)
    return outer(layout.pack(v), layout.pack(plain), layout.pack(rotated), normalized=features.normalized)


def read(
    q: Tensor, summaries: Tensor, mixing: Tensor, layout: BlockLayout, features: Features, dtype: torch.dtype
) -> Tensor:
    """See :func:`mhla_diffusion.ops.tiled.read`."""
    plain, rotated = features_of(q, features)
    mixed = mix(mixing, summaries)
    products = inner(mixed, layout.pack(plain), layout.pack(rotated), normalized=features.normalized)
    return layout.unpack(ratio(products, normalized=features.normalized)).to(dtype)


def features_of(x: Tensor, features: Features) -> tuple[Tensor, Tensor]:
    """phi(x) and, turned, what the numerators are made of; ``[B, H, N, d]``, in float32 or wider."""
    x = phi(x.to(torch.promote_types(x.dtype, torch.float32)), features.feature_map, eps=features.eps)
    if features.mask is not None:
        x = x * features.mask[:, None, :, None]
    if features.rotary is None:
        return x, x
    cos, sin = features.rotary.unflatten(-1, (-1, 2)).unbind(-1)
    return x, apply_rotary_emb(x, (cos, sin))


def outer(v: Tensor, plain: Tensor, rotated: Tensor, *, normalized: bool) -> Tensor:
    """Summaries ``[..., d_v + 1, d]`` of values ``[..., n, d_v]`` and features ``[..., n, d]``."""
    summaries = v.to(plain.dtype).mT @ rotated
    return torch.cat((summaries, plain.sum(-2, keepdim=True)), -2) if normalized else summaries


def inner(summaries: Tensor, plain: Tensor, rotated: Tensor, *, normalized: bool) -> Tensor:
    """Numerators and denominators ``[..., n, d_v + 1]`` of features ``[..., n, d]``."""
    if not normalized:
        return rotated @ summaries.mT
    return torch.cat((rotated @ summaries[..., :-1, :].mT, plain @ summaries[..., -1:, :].mT), -1)


def ratio(products: Tensor, *, normalized: bool) -> Tensor:
    """Numerators over denominators. A query that sees no key gets 0 / 1, not NaN."""
    if not normalized:
        return products
    denominators = products[..., -1:]
    return products[..., :-1] / torch.where(denominators == 0, 1.0, denominators)


def mix(mixing: Tensor, summaries: Tensor) -> Tensor:
    """``S^_i = sum_b W[i, b] S_b``.

    Args:
        mixing: ``[M_q, M_k]``, or one per head ``[H, M_q, M_k]``.
        summaries: ``[B, H, M_k, c, d]``.

    Returns:
        ``[B, H, M_q, c, d]``.
    """
    # Expanded: a matrix of its own for each summary would make matmul transpose all summaries first.
    mixing = mixing.expand(*summaries.shape[:2], *mixing.shape[-2:])
    return (mixing @ summaries.flatten(3)).unflatten(-1, summaries.shape[3:])
