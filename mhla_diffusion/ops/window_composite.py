"""Softmax in blocks in operations of torch, on tokens that are packed by block."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import without_autocast
from .composite import counted
from .layout import BlockLayout, Margin
from .routing import counted_keys, in_softmax_dtype, without_mean


def softmax_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    key_mask: Tensor | None,
    margin: Margin,
    rest: tuple[Tensor, Tensor] | None,
    *,
    causal: bool = False,
) -> Tensor:
    """Return the output of :func:`mhla_diffusion.ops.window_attention` on a grid without extra tokens."""
    q, k, v = in_softmax_dtype(q, k, v)
    k, v = counted(k, key_mask), counted(v, key_mask)
    queries, keys, values, seen = layout.pack(q), *_keys_of_blocks(k, v, layout, key_mask, margin)
    # A mean would see later tokens.
    values, centre = (values, values.new_zeros(1)) if causal else without_mean(values)
    tokens = layout.block_size if causal else None
    seen = _with_one_more_key(seen, rest=rest is not None, tokens=tokens, device=q.device)
    if rest is None:
        near, share = _with_one_more(queries, keys, values, None, seen)
        return layout.unpack(near + (1 - share) * centre)  # the share is 0, or 1 where no key is seen
    far, score = layout.pack(rest[0]), layout.pack(rest[1][..., None])
    near, share = _with_one_more(queries, keys, values, score, seen)
    out = near + share * (far - centre)
    # The gradient of the score, in float32, where the softmax would round both parts of a difference.
    slope = (share * (far - centre - out)).detach()
    return layout.unpack(out + slope * (score - score.detach()) + centre)


def softmax_of_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    key_mask: Tensor | None,
    margin: Margin,
    rest: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Return the same, differentiable any number of times; scores are held in memory."""
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    k, v = counted(k, key_mask), counted(v, key_mask)
    queries, keys, values, seen = layout.pack(q), *_keys_of_blocks(k, v, layout, key_mask, margin)
    scores = queries @ keys.mT / math.sqrt(q.shape[-1])
    if rest is None:
        far, score = values.new_zeros(1), scores.new_zeros(*scores.shape[:-1], 1)
    else:
        far, score = layout.pack(rest[0]), layout.pack(rest[1][..., None])
    seen = _with_one_more_key(seen, rest=rest is not None, tokens=None, device=q.device)
    if seen is None and rest is None:
        return layout.unpack(scores.softmax(-1) @ values)
    all_scores = torch.cat((scores, score), -1)
    if seen is not None:
        all_scores = all_scores.where(seen, -math.inf)
    near, share = all_scores.softmax(-1).split((scores.shape[-1], 1), -1)
    return layout.unpack(near @ values + share * far)


def _with_one_more(
    q: Tensor, k: Tensor, v: Tensor, score: Tensor | None, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend in blocks ``[B, H, M, n, d]`` with one more key, of a score for each query, ``[B, H, M, n, 1]``.

    Returns:
        What the keys of the block add to the output, and the weight of the one more, ``[B, H, M, n, 1]``; its
        score gets no gradient. Without a score the weight is 1 where nothing else is seen, and 0 elsewhere.
    """
    more = score is not None or seen is not None  # else all keys are seen, and there is no one more
    score = q.new_zeros(*q.shape[:-1], 1) if score is None else score.detach()
    dim = v.shape[-1]
    # This score is no product of q and a key: two channels more, whose keys are 1 for it and 0 for others.
    # Two, as one of bfloat16 would round a logarithm by up to 2 %.
    least = torch.finfo(q.dtype).min  # where float16 has no logarithm of nothing, twice this is low enough
    high = score.clamp_min(least).to(q.dtype)
    low = (score - high).clamp_min(least).to(q.dtype)
    scaled = torch.cat((q / math.sqrt(q.shape[-1]), high, low), -1)
    width = -(-max(scaled.shape[-1], dim + 1) // 8) * 8  # as kernels of GPUs want it
    keys, values = (F.pad(x, (0, width - x.shape[-1], 0, int(more))) for x in (k, v))
    if more:
        keys[..., -1, q.shape[-1] : q.shape[-1] + 2] = 1
        values[..., -1, dim] = 1
    queries = F.pad(scaled, (0, width - scaled.shape[-1]))
    queries, keys, values = (x.flatten(0, 1) for x in (queries, keys, values))
    if seen is not None:
        seen = seen.expand(*q.shape[:3], *seen.shape[3:]).flatten(0, 1)
    # Outside autocast, which would take float32 back.
    with without_autocast(q):
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=1.0)
    return out.unflatten(0, q.shape[:2]).split((dim, 1, width - dim - 1), -1)[:2]


def _keys_of_blocks(
    k: Tensor, v: Tensor, layout: BlockLayout, key_mask: Tensor | None, margin: Margin
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values of each block with its margin, ``[B, H, M, n, d]``, and which of them count.

    The last is bool ``[1 or B, 1, M, n]``, or None where all do.
    """
    if not any(layout.margins(margin)):
        whole = layout.is_even and key_mask is None
        return layout.pack(k), layout.pack(v), None if whole else counted_keys(layout, key_mask, k.device)
    token, there = layout.reach(margin, k.device)
    keys, values = (x.index_select(2, token.flatten()).unflatten(2, token.shape) for x in (k, v))
    return keys, values, there[None, None] if key_mask is None else (there & key_mask[:, token])[:, None]


def _with_one_more_key(
    seen: Tensor | None, *, rest: bool, tokens: int | None, device: torch.device
) -> Tensor | None:
    """Which keys of a block, and the one more behind them, a query sees, ``[1 or B, 1, M, 1 or n, n + 1]``.

    Without a rest the one more is seen where nothing else is: whatever its score, no other would be low
    enough beside it. With a number of tokens, that of a block, queries see no later one.
    """
    seen = None if seen is None else seen[..., None, :]
    if tokens is not None:
        earlier = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()[None, None, None]
        seen = earlier if seen is None else seen & earlier
    if seen is None:
        return None
    return torch.cat((seen, torch.ones_like(seen[..., :1]) if rest else ~seen.any(-1, keepdim=True)), -1)
