"""The two halves in operations of torch: slower, differentiable any number of times, and open to other forms.

The causal form is built of these parts; the fast path takes them for gradients of gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .features import Features, apply_rotary_emb, phi
from .layout import BlockLayout


def summarize(k: Tensor, v: Tensor, centre: Tensor, layout: BlockLayout, features: Features) -> Tensor:
    """Return the summaries of :func:`mhla_diffusion.ops.operators.summarize`, sums and all in one tensor."""
    plain, rotated = (layout.pack(x) for x in features_of(k, features))
    if centre.shape[-1]:
        v = v - centre[:, :, None]
    return outer(layout.pack(counted(v, features.mask)), plain, rotated, normalized=features.normalized)


def read(
    q: Tensor,
    summaries: Tensor,
    centre: Tensor,
    mixing: Tensor,
    layout: BlockLayout,
    features: Features,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return what :func:`mhla_diffusion.ops.operators.read` does, from such summaries and weights."""
    plain, rotated = (layout.pack(x) for x in features_of(q, features))
    products = inner(mix(mixing, summaries), plain, rotated, normalized=features.normalized)
    out = ratio(products, normalized=features.normalized)
    if not features.normalized:
        return layout.unpack(within_range(out, dtype)).to(dtype), plain.new_empty(*q.shape[:3], 0)
    denominators = products[..., -1:]
    if centre.shape[-1]:
        out = torch.where(denominators == 0, 0, out + centre[:, :, None, None])
    return layout.unpack(out).to(dtype), layout.unpack(denominators)


def features_of(x: Tensor, features: Features) -> tuple[Tensor, Tensor]:
    """phi(x) and, turned, what the numerators are made of; ``[B, H, N, d]``, in float32 or wider."""
    x = counted(x.to(torch.promote_types(x.dtype, torch.float32)), features.mask)
    x = counted(phi(x, features.feature_map, eps=features.eps), features.mask)
    if features.rotary is None:
        return x, x
    cos, sin = features.rotary.unflatten(-1, (-1, 2)).unbind(-1)
    return x, apply_rotary_emb(x, (cos, sin))


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """``[B, H, N, d]`` with zeros where the mask ``[B, N]`` is false, whatever was there."""
    return x if mask is None else x.masked_fill(~mask[:, None, :, None], 0)


def within_range(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums that have no denominator, none too large for float16 if that is the dtype; NaN stays NaN."""
    # onnxscript 0.7 mends a product between two reshapes wrongly; with a clamp behind it, it does not.
    needed = dtype == torch.float16 or torch.compiler.is_exporting()
    most = torch.finfo(dtype).max
    return sums.clamp(-most, most) if needed else sums


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
        mixing: ``[M_q, M_k]``, ``[H, M_q, M_k]`` or ``[B, H, M_q, M_k]``.
        summaries: ``[B, H, M_k, c, d]``.

    Returns:
        ``[B, H, M_q, c, d]``.
    """
    # Expanded: a matrix of its own for each summary would make matmul transpose all summaries first.
    mixing = mixing.expand(*summaries.shape[:2], *mixing.shape[-2:])
    mixed = mixing @ summaries.flatten(3)
    return mixed.reshape(*mixed.shape[:3], *summaries.shape[3:])


def weights_of(mixing: Tensor, dtype: torch.dtype, features: Features) -> tuple[Tensor, Tensor | None]:
    """Return W as it mixes summaries of that dtype, and what scales its rows, where only ratios count."""
    weights = mixing.to(torch.promote_types(dtype, torch.float32))
    if not (features.normalized and features.scaled):
        return weights, None
    scale = _row_scale(weights.detach())
    return weights * scale, scale


def _row_scale(mixing: Tensor) -> Tensor:
    """Powers of two ``[..., M, 1]`` that bring the largest weight of each row to between 1/2 and 1.

    A quotient does not see them, and no bit of it changes; but with tiny weights numerators and denominators
    would leave the range of float32. A row that is all zero is left as it is: its output is 0, and its
    gradient that of the numerators alone (on GPUs of values less their centre).
    """
    largest = torch.linalg.vector_norm(mixing, torch.inf, -1, keepdim=True)
    largest = largest.masked_fill(largest == 0, 0.5).clamp_min(torch.finfo(mixing.dtype).tiny)
    return torch.frexp(largest).mantissa / largest
