"""MHLA over several ranks that hold different tokens: only summaries are exchanged, whatever their number."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import tiled
from .autocast import as_autocast
from .dispatch import implementation_for
from .features import Features, RotaryEmbedding, check_arguments, turn_all
from .layout import BlockLayout
from .operators import Summaries, read, summarize
from .rotary import rotary_table


def mhla_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    layout: BlockLayout,
    start: int,
    *,
    group: dist.ProcessGroup | None = None,
    feature_map: str = "relu",
    normalizer: str = "paper",
    rotary_emb: RotaryEmbedding | None = None,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`mhla_diffusion.ops.mhla` of a sequence of which this rank holds a part.

    Each rank sums up its own tokens, the sums of all ranks are added (one all-reduce of
    :func:`exchanged_bytes`), and each rank reads for its own queries. A block may lie on several ranks. The
    backward is another all-reduce of that size.

    Gradients of q, k and v are those of one process, where the loss is the sum of the ranks' losses. That of
    mixing, like those of other weights that all ranks share, is this rank's part: add them up over the group.

    Args:
        q, k, v: ``[B, H, n, d]``, a run of tokens in grid order, and this rank's extra tokens before or after
            them.
        mixing: W, the same on every rank.
        layout: of the grid, with the extra tokens of this rank; a rank that has none where others have some
            says ``extra=(0, 0)``.
        start: number of this rank's first token on the grid.
        group: the ranks that hold one sequence; all by default.
        rotary_emb, key_mask: of these tokens, ``[..., n, d / 2]`` and ``[B, n]``.
        feature_map, normalizer, eps, dtype: see :func:`mhla_diffusion.ops.mhla`; normalizer ``"official"``
            is not for parts, as it pairs tokens of all blocks.

    Returns:
        ``[B, H, n, d_v]``, of this rank's queries.

    Raises:
        ValueError: for arguments that do not fit together.
    """
    rotary_emb = rotary_emb and turn_all(rotary_emb, k.shape[2], layout.extra)
    _check(q, k, v, mixing, layout, start, feature_map, normalizer, rotary_emb, key_mask)
    q, k, v = as_autocast(q, k, v)
    tokens = k.shape[2]
    blocks, slots, packed = _slots(layout, start, tokens, q.device)

    def pack(x: Tensor) -> Tensor:
        """Tokens in order of their blocks: ``[..., n, d]`` to ``[..., slots, d]``."""
        return x.new_zeros(*x.shape[:-2], packed.num_tokens, x.shape[-1]).index_copy(-2, slots, x)

    mask = key_mask if key_mask is not None else k.new_ones(len(k), tokens, dtype=torch.bool)
    rotary = rotary_table(rotary_emb)
    features = Features(
        feature_map, eps, normalizer == "paper", None if rotary is None else pack(rotary), shared=True
    )
    key_features = dataclasses.replace(features, mask=pack(mask[..., None])[..., 0])
    part = summarize(pack(k), pack(v), packed, key_features)
    shape = *part.matrices.shape[:2], layout.num_blocks, *part.matrices.shape[3:]
    total = _AllReduce.apply(part.matrices.new_zeros(shape).index_copy(2, blocks, part.matrices), group)
    summaries = part._replace(matrices=total)
    if implementation_for(q, k, v) is not tiled and features.normalized and rotary is None:
        summaries = _centred(summaries)
    out, _ = read(pack(q), summaries, mixing[..., blocks, :], packed, features, dtype or v.dtype)
    return out.index_select(2, slots)


def exchanged_bytes(
    layout: BlockLayout, batch: int, heads: int, d: int, d_v: int, *, normalizer: str = "paper"
) -> int:
    """Count the bytes a rank adds to :func:`mhla_parallel`'s all-reduce, float32: B H M (d_v + 1) d numbers.

    As much again in the backward. It does not grow with the tokens.
    """
    return 4 * batch * heads * layout.num_blocks * (d_v + (normalizer == "paper")) * d


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may be needed in training later
def _slots(
    layout: BlockLayout, start: int, tokens: int, device: torch.device
) -> tuple[Tensor, Tensor, BlockLayout]:
    """The blocks that a rank's tokens touch, ``[L]``; a place for each token, ``[n]``; and their layout.

    The places of a block lie together, as many as the fullest block needs. They are kept, as finding out how
    many that is waits for the device.
    """
    extra = layout.extra or (0, 0)
    block = layout.block_index(device)[layout.grid_tokens][start : start + tokens - sum(extra)]
    block = F.pad(block, extra, value=math.prod(layout.blocks))
    if tokens == 0:
        # One block, all of whose places stay empty: every rank has to take part in the exchange.
        return block.new_zeros(1), block, BlockLayout((1,), (1,))
    blocks, number, counts = block.unique(return_inverse=True, return_counts=True)
    width = int(counts.max())
    order = number.argsort(stable=True)
    first = counts.cumsum(0) - counts
    place = torch.empty_like(order)
    place[order] = torch.arange(tokens, device=device) - first[number[order]]
    return blocks, number * width + place, BlockLayout((len(blocks) * width,), (len(blocks),))


def _centred(summaries: Summaries) -> Summaries:
    """Summaries of ``v - m``, m being the mean of the values, weighted as their features weigh them.

    As :mod:`mhla_diffusion.ops.gpu.mhla` has them of one process, and for the same reason; no rank knows m
    before the exchange.
    """
    matrices, sums = summaries.matrices[..., :-1, :], summaries.matrices[..., -1:, :]
    weight = sums.detach().sum((2, 4))  # [B, H, 1]
    centre = matrices.detach().sum((2, 4)) / torch.where(weight == 0, 1.0, weight)  # [B, H, d_v]
    matrices = torch.cat((matrices - centre[:, :, None, :, None] * sums, sums), -2)
    return summaries._replace(matrices=matrices, centre=centre)


class _AllReduce(torch.autograd.Function):
    """The sum over a group; its gradient is the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Itself, for gradients of gradients.
        return _AllReduce.apply(grads[0], ctx.group), None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    layout: BlockLayout,
    start: int,
    feature_map: str,
    normalizer: str,
    rotary_emb: RotaryEmbedding | None,
    key_mask: Tensor | None,
) -> None:
    if normalizer == "official":
        raise ValueError(
            "normalizer 'official' pairs tokens of all blocks; over ranks take 'paper' or 'none'"
        )
    tokens = k.shape[2]
    on_grid, all_on_grid = tokens - sum(layout.extra or ()), math.prod(layout.grid)
    if not 0 <= start <= start + on_grid <= all_on_grid:
        raise ValueError(
            f"tokens {start} to {start + on_grid} are not on the grid {layout.grid} of {all_on_grid}"
        )
    if mixing.shape[-2:] != (layout.num_blocks,) * 2:
        raise ValueError(
            f"mixing must be [M, M] or [H, M, M] with M = {layout.num_blocks}, got {tuple(mixing.shape)}"
        )
    if tokens:
        check_arguments(
            q, k, v, mixing[..., :1, :1], BlockLayout((tokens,), (1,)), None,
            feature_map=feature_map, normalizer=normalizer, rotary_emb=rotary_emb, key_mask=key_mask,
        )  # fmt: skip
