"""Softmax attention of each query inside its own block, beside MHLA on all blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autocast import as_autocast
from .features import (
    Features,
    RotaryEmbedding,
    check_arguments,
    check_key_mask,
    check_tokens,
)
from .layout import BlockLayout, Margin
from .mhla import attend, mhla
from .operators import in_transform
from .rotary import rotary_table
from .routing import NOTHING, joined, routed_attention
from .window_composite import softmax_in_blocks, softmax_of_scores
from .window_operators import fused_window, is_fused

LOCAL_FORMS = ("shared", "gate")


def mhla_local(
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
    """MHLA with a softmax window: queries see the keys of their own block sharply, others by summaries.

    With ``s`` the scores of softmax attention in the own block b(t) and ``l`` the weights of MHLA:

    - ``"shared"``: one denominator, ``o_t = (sum_own exp(s) v + e^w sum_others l v) / (sum_own exp(s) +
      e^w sum_others l)``;
    - ``"gate"``: ``o_t = g softmax(s) v + (1 - g) mhla``, g the sigmoid of w, mhla over all blocks.

    Args:
        q, k, v, mixing, layout, feature_map, rotary_emb, key_mask, eps: see :func:`mhla_diffusion.ops.mhla`;
            its normalizer is ``"paper"``.
        window: queries and keys of the softmax, ``[B, H, N, d']`` each, with their positions in them.
        weight: w, ``[H]``.
        form: ``"shared"`` or ``"gate"``.
        margin, chosen: tokens around the own block and further blocks that the window holds, see
            :func:`window_attention`. The summaries of their blocks still count among the others.

    Returns:
        ``[B, H, N, d_v]`` in the dtype of v.

    Raises:
        ValueError: for another form or number of weights, and what the operator refuses.
    """
    if form not in LOCAL_FORMS:
        raise ValueError(f"the form of a local window must be of {', '.join(LOCAL_FORMS)}, got {form!r}")

    if weight.shape != q.shape[1:2]:
        raise ValueError(f"weight must be [H] = [{q.shape[1]}], one of each head, got {tuple(weight.shape)}")
    q, k, v, *window_tensors = as_autocast(q, k, v, *window)
    queries, keys = window_tensors
    dtype = torch.promote_types(v.dtype, torch.float32)
    near_options: dict[str, Any] = {"key_mask": key_mask, "margin": margin, "chosen": chosen}
    options: dict[str, Any] = {"feature_map": feature_map, "rotary_emb": rotary_emb, "key_mask": key_mask}
    if form == "gate":
        gate = weight.to(torch.promote_types(weight.dtype, torch.float32)).sigmoid()[:, None, None]
        near = window_attention(queries, keys, v, layout, **near_options)
        far = mhla(q, k, v, mixing, layout, eps=eps, dtype=dtype, **options)
        return (gate * near + (1 - gate) * far).to(v.dtype)
    check_arguments(q, k, v, mixing, layout, None, normalizer="paper", **options)
    rotary = rotary_table(rotary_emb, layout.num_tokens, layout.extra)
    # Denominators are of W as it is: they are weighed against those of the window.
    features = Features(feature_map, eps, normalized=True, rotary=rotary, scaled=False)
    others = _others(mixing.to(dtype))
    far, sums = attend(q, k, v, others, layout, layout, features, key_mask, dtype)
    tiny = torch.finfo(sums.dtype).tiny
    log_sums = (sums[..., 0].clamp_min(tiny).log() + weight[:, None].to(sums.dtype)).clamp_min(NOTHING)
    log_sums = log_sums.masked_fill(sums[..., 0] == 0, NOTHING)  # no other is seen
    return window_attention(queries, keys, v, layout, rest=(far, log_sums), **near_options).to(v.dtype)


def _others(mixing: Tensor) -> Tensor:
    """W without its diagonal: the own block is the window's."""
    apart = 1 - torch.eye(mixing.shape[-1], dtype=mixing.dtype, device=mixing.device)
    others = mixing * apart
    if not mixing.requires_grad:
        return others
    # A row that is all zero, as two blocks start by locality, would have no gradient, that of 0 / 0: it gets
    # weights whose squares and inverses are in the range of float32, and which change no output unless all
    # scores of the window are below -30.
    little = torch.finfo(mixing.dtype).eps ** 2
    return others + apart * (little * (others.detach() == 0).all(-1, keepdim=True))


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    key_mask: Tensor | None = None,
    margin: Margin = 0,
    chosen: Tensor | None = None,
    rest: tuple[Tensor, Tensor] | None = None,
    causal: bool = False,
) -> Tensor:
    """Softmax attention of each query inside its own block; time O(N n d) for blocks of n tokens.

    Without a margin a token at the border of a block sees none of those beyond, and samples show the borders.

    Args:
        q, k: ``[B, H, N, d]`` in grid order.
        v: ``[B, H, N, d_v]``.
        layout: the grid and its blocks.
        key_mask: bool ``[B, N]``, true where a key counts; what others hold does not matter.
        margin: tokens around its block that a query sees as well, along each axis of the grid or for all of
            them; n then counts them in.
        chosen: further blocks of each query, int64 ``[B, H, N, r]``, see
            :func:`mhla_diffusion.ops.choose_blocks`. A key in the margin and in one of them counts twice.
        rest: the output on all else, ``[B, H, N, d_v]``, and the logarithm of its denominator, ``[B, H, N]``:
            it joins the softmax as one more key of each query.
        causal: tokens see no later one of their block; for runs of a sequence, ``BlockLayout((N,), (M,))``,
            without a margin, chosen blocks or extra tokens.
            With ``rest`` from :func:`mhla_causal` under a strictly lower W it is the causal form of "shared".

    Returns:
        ``[B, H, N, d_v]`` in float32 or above. A query that sees no key gets 0.

    Raises:
        ValueError: for a mask of another dtype or shape, tensors that do not fit each other or the grid,
            chosen blocks that are none, and what a causal window does not have.
    """
    check_tokens(q, k, v, layout, layout)
    check_key_mask(key_mask, k)
    is_routed = chosen is not None and chosen.shape[-1:] != (0,)
    if causal:
        _check_causal(layout, margin, chosen if is_routed else None)
    q, k, v = as_autocast(q, k, v)
    if chosen is not None and is_routed:
        found = routed_attention(q, k, v, chosen, layout, key_mask=key_mask)
        parts = [found] if rest is None else [found, rest]
        outs, sums = zip(*parts, strict=True)
        rest = joined(torch.stack(outs, -2), torch.stack(sums, -1))
    if layout.extra is not None:
        return _apart(q, k, v, layout, key_mask, margin, rest)

    # The kernel of torch for CPUs has no derivative but the first.
    if in_transform() and not causal:
        return softmax_of_scores(q, k, v, layout, key_mask, margin, rest)
    # One block is softmax attention, which torch has faster kernels for.
    if not causal and layout.num_blocks > 1 and is_fused(q, k, v):
        return fused_window(q, k, v, layout, key_mask, margin, rest)
    return softmax_in_blocks(q, k, v, layout, key_mask, margin, rest, causal=causal)


def _check_causal(layout: BlockLayout, margin: Margin, chosen: Tensor | None) -> None:
    """Refuse what would show a query later tokens, and tokens that have no place in a sequence."""
    for name, given, value in (
        ("margin", any(layout.margins(margin)), margin),
        ("chosen blocks", chosen is not None, None if chosen is None else tuple(chosen.shape)),
        ("extra tokens", layout.extra is not None, layout.extra),
    ):
        if given:
            raise ValueError(
                f"a causal window has no {name}, in which later tokens would be seen, got {value}: leave "
                "that out, or set causal=False"
            )


def _apart(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    key_mask: Tensor | None,
    margin: Margin,
    rest: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Attend in the blocks of the grid and, apart, in that of extra tokens, which may be far larger."""
    inside = layout.grid_tokens

    def attend(tokens: Tensor | slice, part: BlockLayout, margin: Margin = 0) -> Tensor:
        few = None if rest is None else (rest[0][:, :, tokens], rest[1][:, :, tokens])
        counts = None if key_mask is None else key_mask[:, tokens]
        query, key, value = (x[:, :, tokens] for x in (q, k, v))
        return window_attention(query, key, value, part, key_mask=counts, margin=margin, rest=few)

    on_grid = attend(inside, BlockLayout(layout.grid, layout.blocks), margin)
    number = sum(layout.extra or ())
    if not number:
        return on_grid
    index = torch.arange(layout.num_tokens, device=q.device)
    outside = torch.cat((index[: inside.start], index[inside.stop :]))
    extra = attend(outside, BlockLayout((number,), (1,)))
    return torch.cat((extra[:, :, : inside.start], on_grid, extra[:, :, inside.start :]), 2)
