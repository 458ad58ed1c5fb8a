"""Mixing matrices: how each query block weighs the summaries of the key blocks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import without_autocast
from .composite import counted
from .layout import BlockLayout

MIXING_STARTS = ("locality", "uniform", "identity", "cosine", "exponential", "gaussian", "window", "official")


def block_distances(layout: BlockLayout) -> Tensor:
    """Euclidean distance between block centres on the block grid, ``[M, M]``, float64, in blocks.

    A block of extra tokens lies nowhere and is left out.
    """
    axes = [torch.arange(count, dtype=torch.float64) for count in layout.blocks]
    centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
    return (centres[:, None] - centres[None]).square().sum(-1).sqrt()


def locality_mixing(layout: BlockLayout) -> Tensor:
    """Mixing matrix of the paper's start: nearer blocks weigh more (section 4.2).

    ``W[i, j]`` is proportional to ``1 - dist(i, j) / max_k dist(i, k)``, rows normalised to sum 1. With one
    block, ``[[1]]``. For extra tokens see :func:`extend_mixing`.

    Returns:
        ``[M, M]``, float32, in [0, 1].
    """
    return initial_mixing(layout, "locality")


def initial_mixing(layout: BlockLayout, start: str) -> Tensor:
    """Mixing matrix to start from.

    With r the distance between block centres (:func:`block_distances`) and R the largest distance on the
    block grid; all starts but the last have rows of sum 1:

    - ``locality``: ``1 - r / max of the row``;
    - ``uniform``: 1, which is plain linear attention until it is trained;
    - ``identity``: attention inside each block alone;
    - ``cosine``: ``(1 + cos(pi r / R)) / 2``; ``exponential``: ``exp(-r)``; ``gaussian``: ``exp(-r^2 / 2)``;
    - ``window``: 1 where ``r <= 1``;
    - ``official``: ``1 - r / R`` with columns normalised, as the public reference code has it, so that rows
      sum to about 0.8-1.2. A deviation from the paper, here only to reproduce runs of that code.

    With extra tokens :func:`extend_mixing` adds their row and column, whatever the start.

    Returns:
        ``[M, M]``, float32, in [0, 1].

    Raises:
        ValueError: for a start that is not in ``MIXING_STARTS``.
    """
    if start not in MIXING_STARTS:
        raise ValueError(f"mixing start {start!r} is not one of {', '.join(MIXING_STARTS)}")
    weights = _start_on_grid(layout, start)
    return (weights if layout.extra is None else extend_mixing(weights)).float()


def _start_on_grid(layout: BlockLayout, start: str) -> Tensor:
    if math.prod(layout.blocks) == 1:
        return torch.ones(1, 1)
    r = block_distances(layout)
    if start == "official":
        weights = 1 - r / r.max()
        return weights / weights.sum(0, keepdim=True)
    weights = {
        "locality": lambda: 1 - r / r.amax(1, keepdim=True),
        "uniform": lambda: torch.ones_like(r),
        "identity": lambda: torch.eye(len(r), dtype=r.dtype),
        "cosine": lambda: (1 + torch.cos(torch.pi * r / r.max())) / 2,
        "exponential": lambda: torch.exp(-r),
        "gaussian": lambda: torch.exp(-(r**2) / 2),
        "window": lambda: (r <= 1).double(),
    }[start]()
    return weights / weights.sum(1, keepdim=True)


def extend_mixing(mixing: Tensor) -> Tensor:
    """Add a row and a column for extra tokens to a mixing matrix of a grid.

    Extra tokens lie nowhere, and so as near to each block as can be: their column is the largest weight of
    each row (the block's own, at the locality start), and their row sees all blocks alike. Rows keep their
    sums, and the new one has the mean of them. An extension: the paper has tokens on a grid alone.

    Args:
        mixing: ``[M, M]`` or ``[H, M, M]``.

    Returns:
        ``[M + 1, M + 1]`` or ``[H, M + 1, M + 1]``.
    """
    wider = torch.cat((mixing, mixing.amax(-1, keepdim=True)), -1)
    wider = torch.cat((wider, torch.ones_like(wider[..., :1, :])), -2)
    sums = mixing.sum(-1)
    return _with_sums(wider, torch.cat((sums, sums.mean(-1, keepdim=True)), -1))


def relative_mixing(weights: Tensor, blocks: tuple[int, ...], *, extra: bool = False) -> Tensor:
    """Mixing matrix that depends on the offset of blocks alone, ``W[i, j] = w[i - j]`` (Toeplitz).

    Args:
        weights: w, ``[..., (2 a - 1)(2 b - 1)...]``, in the order of the offsets of each axis,
            ``1 - a`` to ``a - 1``.
        blocks: along each axis, ``(a, b, ...)``.
        extra: whether there are extra tokens, which lie at no offset: w has three weights more, that of
            their column, of their row, and of themselves.

    Returns:
        ``[..., M, M]``.
    """
    return weights[..., _offsets(blocks, weights.device, extra)]


def causal_mixing(weights: Tensor, blocks: int) -> Tensor:
    """Mixing matrix of a sequence by how far back a block lies, ``W[i, j] = w[min(i - j, m - 1)]``, j <= i.

    All blocks m - 1 or more back weigh alike, so that m weights are enough for sequences of any length. An
    extension: the causal W of the paper has a weight for each pair of blocks.

    Args:
        weights: w, ``[..., m]``.
        blocks: M, of the sequence.

    Returns:
        ``[..., M, M]``, lower triangular.
    """
    place = torch.arange(blocks, device=weights.device)
    back = place[:, None] - place
    return weights[..., back.clamp(0, weights.shape[-1] - 1)] * (back >= 0)


def content_mixing(
    mixing: Tensor,
    q: Tensor,
    k: Tensor,
    strength: Tensor,
    layout: BlockLayout,
    *,
    key_layout: BlockLayout | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Mixing matrix that follows what is in the blocks: ``W[i, b] exp(s sqrt(d) cos(q_i, k_b))``.

    q_i and k_b are the mean query and the mean key of a block. Rows keep the sums that they have in W, and
    weights of 0 stay 0. Strength 0 leaves W as it is. An extension: the paper's W depends on the numbers of
    the blocks alone. Time O(N d + M^2 d).

    Args:
        mixing: W, ``[M, M_k]`` or ``[H, M, M_k]``.
        q, k: ``[B, H, N, d]`` and ``[B, H, N_k, d]``, without positions.
        strength: s, ``[H]``.
        layout, key_layout, key_mask: see :func:`mhla_diffusion.ops.mhla`.

    Returns:
        ``[B, H, M, M_k]``, float32 or wider.
    """
    # Means have the direction of sums; a mask leaves keys out, and a block of none has direction 0.
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = layout.block_sums(q, wide)
    keys = (key_layout or layout).block_sums(counted(k, key_mask), wide)
    # Outside autocast, as products of 16 bits are a hundredth off.
    with without_autocast(q):
        cosines = _directions(queries) @ _directions(keys).mT  # [B, H, M, M_k]
    weights = mixing.to(wide)
    found = weights * (strength.to(wide)[:, None, None] * math.sqrt(q.shape[-1]) * cosines).exp()
    return _with_sums(found, weights.sum(-1).expand(found.shape[:-1]))


def _directions(x: Tensor) -> Tensor:
    """Vectors of length 1; those of zeros stay, and get no gradient, which would be one over their length."""
    return F.normalize(torch.where((x == 0).all(-1, keepdim=True), x.detach(), x), dim=-1)


def offset_means(mixing: Tensor, blocks: tuple[int, ...], *, extra: bool = False) -> Tensor:
    """Weights of :func:`relative_mixing` nearest to a matrix: the mean over all pairs of the same offset.

    Args:
        mixing: ``[..., M, M]``.
        blocks: along each axis.
        extra: whether its last row and column are of extra tokens.

    Returns:
        ``[..., (2 a - 1)(2 b - 1)...]``, and three weights more for extra tokens.
    """
    offsets = _offsets(blocks, mixing.device, extra).flatten()
    counts = offsets.bincount()
    sums = mixing.new_zeros(*mixing.shape[:-2], len(counts)).index_add(-1, offsets, mixing.flatten(-2))
    return sums / counts


def _offsets(blocks: tuple[int, ...], device: torch.device, extra: bool) -> Tensor:
    """Number of the offset of each pair of blocks, ``[M, M]``."""
    most = math.prod([2 * count - 1 for count in blocks])  # torch.compile takes no generator
    axes = [torch.arange(count, device=device) for count in blocks]
    number = torch.zeros((), dtype=torch.int64, device=device)
    for position, count in zip(torch.meshgrid(*axes, indexing="ij"), blocks, strict=True):
        along = position.flatten()
        number = number * (2 * count - 1) + along[:, None] - along + count - 1
    if extra:
        number = F.pad(F.pad(number, (0, 1), value=most), (0, 0, 0, 1), value=most + 1)
        number[-1:, -1:] = most + 2  # a view of one number would be copied to, which no CUDA graph may hold
    return number


def resize_mixing(
    mixing: Tensor,
    from_layout: BlockLayout,
    to_layout: BlockLayout,
    *,
    from_keys: BlockLayout | None = None,
    to_keys: BlockLayout | None = None,
) -> Tensor:
    """Mixing matrix for other blocks: interpolated linearly over the coordinates of query and key blocks.

    Each row keeps its sum: that of a new query block is interpolated between those of its neighbours. The
    same blocks give the same matrix. The row and the column of extra tokens are interpolated along the grid.

    Args:
        mixing: ``[M, M]`` or ``[H, M, M]``, for the blocks of ``from_layout``.
        from_layout, to_layout: of the same number of axes; their grids do not matter.
        from_keys, to_keys: the layouts of the keys in cross-attention, where W is ``[(H,) M, M_k]``; else
            those of the queries.

    Returns:
        ``[M', M']`` or ``[H, M', M']``, in the dtype of ``mixing``. Weights above 1 can arise where there are
        fewer blocks than before.

    Raises:
        ValueError: for a matrix of another size, or layouts with different numbers of axes, or of which one
            alone has extra tokens.
    """
    from_keys, to_keys = from_keys or from_layout, to_keys or to_layout
    sizes = from_layout.num_blocks, from_keys.num_blocks
    if mixing.shape[-2:] != sizes:
        raise ValueError(
            f"mixing must be [..., M, M_k] with M = {sizes[0]} (blocks {from_layout.blocks}) and M_k = "
            f"{sizes[1]} (blocks {from_keys.blocks}), got {tuple(mixing.shape)}"
        )
    for old, new in ((from_layout, to_layout), (from_keys, to_keys)):
        if len(old.blocks) != len(new.blocks):
            raise ValueError(
                f"blocks {old.blocks} cannot be resized to {new.blocks}: the numbers of axes differ"
            )
        if (old.extra is None) != (new.extra is None):
            raise ValueError(
                f"one alone of {old} and {new} has extra tokens: add their row and column with "
                "extend_mixing, or cut them off, mixing[..., :-1, :-1]"
            )
    if (from_layout.blocks, from_keys.blocks) == (to_layout.blocks, to_keys.blocks):
        return mixing
    weights = mixing.to(torch.promote_types(mixing.dtype, torch.float32))
    sums = _interpolate(weights.sum(-1), from_layout.blocks, to_layout.blocks)  # [..., M']
    weights = _interpolate(weights.mT, from_layout.blocks, to_layout.blocks).mT
    weights = _interpolate(weights, from_keys.blocks, to_keys.blocks)
    return _with_sums(weights, sums).to(mixing.dtype)


def _with_sums(weights: Tensor, sums: Tensor) -> Tensor:
    """Rows ``[..., M, M_k]`` scaled to sums ``[..., M]``; rows of sum zero become zero."""
    found = weights.sum(-1)
    scale = torch.where(found == 0, 0.0, sums / torch.where(found == 0, 1.0, found))
    return weights * scale[..., None]


def _interpolate(values: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Linear interpolation over a grid of blocks, which the last axis runs over: [..., M] to [..., M'].

    What stands behind those blocks, of extra tokens, stays behind the new ones.
    """
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(old)]
    on_grid, extra = values[..., : math.prod(old)], values[..., math.prod(old) :]
    resized = F.interpolate(on_grid.reshape(1, -1, *old), size=new, mode=mode)
    return torch.cat((resized.reshape(*values.shape[:-1], -1), extra), -1)
