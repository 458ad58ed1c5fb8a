"""Softmax attention of each query in further blocks that it chooses for itself."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .autocast import as_autocast, without_autocast
from .composite import counted
from .layout import BlockLayout
from .operators import is_watched

# The logarithm of a denominator without keys, in float32 or above: below all others, as softmax does not see
# by how much all scores are low, and finite, as minus infinity less itself would be NaN.
NOTHING = -1e30

# Blocks whose covariances meet all queries in one product, which holds d numbers for each block and query.
_BLOCKS_AT_ONCE = 8

# Where the backward of softmax attention on few keys is slower in 16 bits than in float32: 128 blocks of 64
# queries and 65 keys of 40 channels take 37 ms in bfloat16 and 11 in float32, on a core of an AMD EPYC with
# AVX512-BF16 and torch 2.14.
_WIDE_DEVICES = ("cpu",)

# Queries of one block are worked on in groups of a size within these.
_GROUP_SIZES = (16, 128)


@torch.no_grad()
def choose_blocks(
    q: Tensor,
    k: Tensor,
    layout: BlockLayout,
    count: int,
    *,
    exact: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Choose for each query the blocks that hold most of its softmax, its own left out.

    What a block of n keys holds, ``log sum_j exp(s_j)`` of scores ``s_j = q . k_j / sqrt(d)``, is taken for
    what it would be if they were Gaussian: ``log n + m + v / 2`` with mean ``m = q . mean(k) / sqrt(d)`` and
    variance ``v = q^T cov(k) q / d``. A key that a query is sharp on shows by its square: among random ones,
    sqrt(d / 2) times as clearly as in a sum of scores. Time O(N M d^2), memory O(N (M + d)). ``exact`` takes
    the scores themselves, in time O(N^2 d), which is less where a block has fewer tokens than d, and memory
    O(N (M + d + n)). Nothing here has a gradient.

    Args:
        q, k: ``[B, H, N, d]`` as the softmax gets them.
        layout: the grid and its blocks. Extra tokens choose as all others do, and are not chosen.
        count: blocks for each query, or all others where there are fewer.
        exact: whether blocks are ranked by all scores, in place of mean and covariance.
        key_mask: bool ``[B, N]``, true where a key counts.

    Returns:
        Numbers of blocks, int64 ``[B, H, N, count]``, the best first.

    Raises:
        ValueError: for a count that is no integer of 0 or more.
    """
    if not hasattr(count, "__index__") or count < 0:
        raise ValueError(f"count must be an integer of at least 0 blocks for each query, got {count!r}")
    on_grid, inside = BlockLayout(layout.grid, layout.blocks), layout.grid_tokens
    seen = counted_keys(on_grid, None if key_mask is None else key_mask[:, inside], q.device)[..., None]
    keys = on_grid.pack(counted(k.float(), key_mask)[:, :, inside])  # [B, H, M, n, d]
    queries = q.float() / math.sqrt(q.shape[-1])
    # Outside autocast: in 16 bits blocks would be mistaken for others.
    with without_autocast(q):
        scores = (_exact_sums if exact else _gaussian_sums)(queries, keys, seen)
    blocks = torch.arange(on_grid.num_blocks, device=q.device)
    own = layout.block_index(q.device)[:, None] == blocks
    # Above the own one are those that hold no key, too, as keys of its would count twice.
    scores = scores.clamp_min(torch.finfo(scores.dtype).min)
    return scores.masked_fill(own, -math.inf).topk(min(count, len(blocks) - 1), -1).indices


def _gaussian_sums(queries: Tensor, keys: Tensor, seen: Tensor) -> Tensor:
    """What blocks would hold of Gaussian scores, ``log n + m + v / 2``, ``[B, H, N, M]``.

    Args:
        queries: ``[B, H, N, d]``, scaled.
        keys: ``[B, H, M, n, d]``, 0 where they do not count.
        seen: bool ``[B or 1, 1, M, n, 1]``.
    """
    number = seen.sum(-2)  # [B or 1, 1, M, 1]
    mean = keys.sum(-2) / number.clamp_min(1)
    apart = (keys - mean[..., None, :]) * seen
    covariance = apart.mT @ apart / number.clamp_min(1)[..., None]
    scores = queries @ mean.mT + number.mT.log()
    parts = covariance.transpose(2, 3).split(_BLOCKS_AT_ONCE, 3)  # [B, H, d, blocks, d] each
    products = ((queries @ part.flatten(3)).unflatten(-1, part.shape[3:]) for part in parts)
    variances = [(product * queries[..., None, :]).sum(-1) for product in products]
    return scores + torch.cat(variances, -1) / 2


def _exact_sums(queries: Tensor, keys: Tensor, seen: Tensor) -> Tensor:
    """What blocks hold, ``log sum_j exp(s_j)``; arguments and result as of :func:`_gaussian_sums`."""
    found, (tokens, d) = [], keys.shape[-2:]
    at_once = min(_BLOCKS_AT_ONCE, max(1, _BLOCKS_AT_ONCE * d // tokens))  # few where blocks are large
    for part, counts in zip(*(x.split(at_once, 2) for x in (keys, seen)), strict=True):
        scores = (queries @ part.flatten(2, 3).mT).unflatten(-1, part.shape[2:4])
        scores = scores.masked_fill_(~counts[:, :, None, ..., 0], torch.finfo(scores.dtype).min)
        # As logsumexp, which takes twice as long on a CPU.
        largest = scores.amax(-1, keepdim=True)
        found.append(scores.sub_(largest).exp_().sum(-1).log_() + largest[..., 0])
    return torch.cat(found, -1)


def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, layout: BlockLayout, *, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query in the blocks chosen for it, O(N r n d) for r blocks of n tokens.

    Queries are sorted by block and attend in groups, so that products are of matrices; memory holds the
    scores, N r n numbers. (As Mixture of Block Attention does, arXiv 2502.13189, which chooses by mean keys.)

    Args:
        q, k: ``[B, H, N, d]`` in grid order; v ``[B, H, N, d_v]``.
        chosen: of :func:`choose_blocks`, ``[B, H, N, r]``.
        layout: the grid and its blocks.
        key_mask: bool ``[B, N]``, true where a key counts.

    Returns:
        The output ``[B, H, N, d_v]``, 0 where a query sees no key, and the logarithm of its denominator
        ``[B, H, N]``, float32 or above: the ``rest`` of :func:`mhla_diffusion.ops.window_attention`.

    Raises:
        ValueError: for chosen blocks of another dtype or shape and, on CPUs, that the grid does not have.
    """
    _check_chosen(chosen, q, layout)
    q, k, v = in_softmax_dtype(*as_autocast(q, k, v))
    k, v = counted(k, key_mask), counted(v, key_mask)
    tokens, routes = chosen.shape[2:]
    inside, on_grid = layout.grid_tokens, BlockLayout(layout.grid, layout.blocks)
    place, block_of_group, size = _groups(chosen.flatten(2), on_grid)
    groups = block_of_group.shape[-1]

    pairs = torch.arange(tokens, device=q.device).repeat_interleave(routes).expand_as(place)
    token_at = pairs.new_zeros(*place.shape[:2], groups * size).scatter(2, place, pairs)
    queries = _take(q, token_at).unflatten(2, (groups, size))
    keys, values = (
        _take(on_grid.pack(x[:, :, inside]).flatten(3), block_of_group).unflatten(3, (-1, x.shape[-1]))
        for x in (k, v)
    )  # [B, H, G, n, d]
    # Outside autocast, which would take float32 back.
    with without_autocast(q):
        scores = (queries @ keys.mT).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])
    if key_mask is not None or not on_grid.is_even:
        seen = counted_keys(on_grid, None if key_mask is None else key_mask[:, inside], q.device)
        seen = _take(seen.expand(*block_of_group.shape[:2], -1, -1), block_of_group)
        scores = scores.where(seen[..., None, :], NOTHING)
    log_sums = scores.logsumexp(-1)
    values, centre = without_mean(values)
    with without_autocast(q):
        out = (scores - log_sums[..., None]).exp().to(v.dtype) @ values + centre

    outs = _take(out.flatten(2, 3), place).unflatten(2, (tokens, routes))
    each = log_sums.flatten(2).gather(2, place).unflatten(2, (tokens, routes))
    out, log_sum = joined(outs, each)
    return out.where(log_sum[..., None] > NOTHING / 2, 0), log_sum


def _check_chosen(chosen: Tensor, q: Tensor, layout: BlockLayout) -> None:
    """Refuse numbers that name no blocks of the grid for queries ``[B, H, N, d]``."""
    if chosen.dtype != torch.int64 or chosen.ndim != 4 or chosen.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"chosen must be int64 [B, H, N, r] = [{', '.join(map(str, q.shape[:3]))}, r], numbers of blocks "
            f"as choose_blocks gives them, got {chosen.dtype} {tuple(chosen.shape)}"
        )
    # GPUs would have to be waited for.
    if chosen.device.type != "cpu" or is_watched((q, chosen)) or not chosen.numel():
        return
    least, most = (int(x) for x in chosen.aminmax())
    number = math.prod(layout.blocks)
    if least < 0 or most >= number:
        raise ValueError(
            f"chosen must be numbers of the {number} blocks of the grid, 0 to {number - 1}, as choose_blocks "
            f"gives them, got {least if least < 0 else most}"
        )


def in_softmax_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in one dtype, the widest of theirs, and float32 or above on a CPU."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    if tensors[0].device.type in _WIDE_DEVICES:
        dtype = torch.promote_types(dtype, torch.float32)
    return tuple(x.to(dtype) for x in tensors)


def joined(outs: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Join parts of one softmax: outputs ``[..., r, d]``, logarithms of their denominators ``[..., r]``."""
    return (log_sums.softmax(-1)[..., None] * outs).sum(-2), log_sums.logsumexp(-1)


def without_mean(v: Tensor) -> tuple[Tensor, Tensor]:
    """Take their mean from the values of a block, ``[..., n, d_v]``: as weights sum to 1, it is added after.

    Without it, 16 bits hold what differs among values, and of that are the gradients of scores. Wider dtypes
    have room for both, and keep it.

    Returns:
        Values in their dtype, and the mean, in float32 or above, ``[..., 1, d_v]`` or 0, ``[1]``; it needs no
        gradient.
    """
    if v.dtype.itemsize > 2:
        return v, v.new_zeros(1)
    centre = v.detach().mean(-2, keepdim=True, dtype=torch.promote_types(v.dtype, torch.float32))
    return (v - centre).to(v.dtype), centre


def _groups(blocks: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor, int]:
    """Sort pairs of a query and a block into groups of one block each.

    Args:
        blocks: ``[B, H, P]``, of each pair.

    Returns:
        The place of each pair in the groups, laid end to end, ``[B, H, P]``; the block of each group,
        ``[B, H, G]``; the size of a group. G is the largest number that can be needed, whatever is chosen.
    """
    pairs, number = blocks.shape[-1], layout.num_blocks
    # A block's last group is half empty on average: four groups to the pairs of a block waste an eighth.
    size = min(max(_GROUP_SIZES[0], pairs // (4 * number)), _GROUP_SIZES[1])
    order = blocks.argsort(dim=-1, stable=True)
    ordered = blocks.gather(-1, order)
    counts = blocks.new_zeros(*blocks.shape[:2], number).scatter_add(-1, blocks, torch.ones_like(blocks))
    ends = (-(-counts // size)).cumsum(-1)  # groups up to and with each block
    starts = ends.roll(1, -1)
    starts[..., 0] = 0
    rank = torch.arange(pairs, device=blocks.device) - (counts.cumsum(-1) - counts).gather(-1, ordered)
    place = torch.empty_like(blocks).scatter(-1, order, starts.gather(-1, ordered) * size + rank)
    groups = torch.arange(pairs // size + number, device=blocks.device).expand(*blocks.shape[:2], -1)
    of_group = torch.searchsorted(ends, groups.contiguous(), right=True).clamp_max(number - 1)
    return place, of_group, size


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``[B, H, I, d]`` of ``[B, H, N, d]``."""
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))


def counted_keys(layout: BlockLayout, key_mask: Tensor | None, device: torch.device) -> Tensor:
    """Return which places of blocks hold a key that counts, bool ``[B or 1, 1, M, n]``."""
    if key_mask is None:
        key_mask = torch.ones(1, layout.num_tokens, dtype=torch.bool, device=device)
    return layout.pack(key_mask[:, None, :, None].byte())[..., 0].bool()
