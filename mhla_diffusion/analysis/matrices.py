"""Attention matrices and mixing matrices in numbers and pictures: tensors in, records out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..files.pages import written
from ..ops import (
    BlockLayout,
    choose_blocks,
    mhla_local,
    mhla_reference,
    window_attention,
)
from ..ops.features import turned


@dataclass(frozen=True)
class MatrixStatistics:
    """Statistics of an attention matrix ``[N, N]``, means over samples and heads.

    Args:
        rank: numerical rank: singular values above ``N eps sigma_max``, eps of float32.
        entropy: of its rows, in nats; ``log N`` where all tokens weigh the same.
    """

    rank: float
    entropy: float


@dataclass(frozen=True)
class MixingAudit:
    """Statistics of a mixing matrix, over all heads.

    Args:
        minimum, maximum: of its weights.
        negatives: how many are below zero, which checkpoints of the public reference code have.
        row_sum_minimum, row_sum_maximum: 1 at the locality start.
        row_entropy: mean over rows of ``|W|``, in nats; ``log M`` where all blocks weigh the same.
        extra_share: mean over the blocks of a grid of what of their row is the weight of extra tokens.
        change: Frobenius norm of the difference from the start, over that of the start.
    """

    minimum: float
    maximum: float
    negatives: int
    row_sum_minimum: float
    row_sum_maximum: float
    row_entropy: float
    change: float
    extra_share: float | None = None


def attention_matrices(
    q: Tensor,
    k: Tensor,
    mixing: Tensor,
    layout: BlockLayout,
    rotary_emb: Any,
    options: dict[str, Any],
    features: tuple[Tensor, Tensor] | None = None,
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Yield for each attention the matrix that acts on values, and the positive one whose rows sum to 1.

    Both are over the paper's denominator, whatever the layer's own: without one rows are these, scaled.

    ``features`` are what linear attention gets in place of q and k.
    """
    turned, rotary_emb = _turned(q, k, rotary_emb, layout, features)
    scores = turned[0] @ turned[1].mT / math.sqrt(q.shape[-1])
    if (mask := options.get("key_mask")) is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    softmax = scores.softmax(-1)[0, 0]
    yield "softmax", (softmax, softmax)
    if features is not None:
        q, k = features
    # The operator on values that are a unit matrix is its matrix.
    unit = torch.eye(q.shape[2], dtype=torch.float64, device=q.device)[None, None]
    whole = BlockLayout(layout.grid, (1,) * len(layout.grid), layout.extra)
    ones = mixing.new_ones(whole.num_blocks, whole.num_blocks)
    for name, weights, blocks in (("linear", ones, whole), ("mhla", mixing, layout)):
        plain = mhla_reference(q, k, unit, weights, blocks, **options)[0, 0]
        if rotary_emb is None:
            yield name, (plain, plain)
        else:
            acting = mhla_reference(q, k, unit, weights, blocks, rotary_emb=rotary_emb, **options)[0, 0]
            yield name, (acting, plain)


def window_matrices(
    q: Tensor,
    k: Tensor,
    mixing: Tensor,
    layout: BlockLayout,
    rotary_emb: Any,
    options: dict[str, Any],
    features: tuple[Tensor, Tensor],
    *,
    form: str,
    weight: Tensor | None,
    margin: int | tuple[int, ...] = 0,
    routes: int = 0,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the matrix of attention with a softmax window that acts on values, and the positive one.

    ``form`` and ``weight``, of the one head, are those of :func:`mhla_diffusion.ops.mhla_local`; without a
    weight the window is alone. ``margin``, ``routes`` and ``exact`` are ``local_margin``, ``routed_blocks``
    and ``exact_routing`` of the config.
    """
    window, rotary_emb = _turned(q, k, rotary_emb, layout, features)
    unit = torch.eye(q.shape[2], dtype=torch.float64, device=q.device)[None, None]
    mask = options.get("key_mask")
    chosen = choose_blocks(*window, layout, routes, exact=exact, key_mask=mask) if routes else None
    if weight is None:
        found = window_attention(*window, unit, layout, key_mask=mask, margin=margin, chosen=chosen)[0, 0]
        return found, found
    acting, plain = (
        mhla_local(
            *features, unit, mixing, layout, window=window, weight=weight, form=form, rotary_emb=tables,
            margin=margin, chosen=chosen, **options,
        )[0, 0]
        for tables in (rotary_emb, None)
    )  # fmt: skip
    return acting, plain


def _turned(
    q: Tensor, k: Tensor, rotary_emb: Any, layout: BlockLayout, features: tuple[Tensor, Tensor] | None
) -> tuple[tuple[Tensor, Tensor], Any]:
    """Queries and keys with their positions, and the rotary tables of the features: wide ones have two."""
    window = turned(q, k, rotary_emb, layout)
    if rotary_emb is not None and features is not None and features[0].shape[-1] != q.shape[-1]:
        rotary_emb = tuple(torch.cat((table, table), -1) for table in rotary_emb)
    return window, rotary_emb


def matrix_statistics(acting: Tensor, weights: Tensor) -> MatrixStatistics:
    rtol = len(acting) * torch.finfo(torch.float32).eps
    rank = float(torch.linalg.matrix_rank(acting, rtol=rtol))
    return MatrixStatistics(rank, _entropy(weights))


def _entropy(weights: Tensor) -> float:
    """Mean over rows of ``- sum p log p``, p being the row over its sum; of weights below zero their size."""
    p = weights.abs()
    p = p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    return float(torch.special.entr(p).sum(-1).mean())


def mean_statistics(statistics: list[MatrixStatistics]) -> MatrixStatistics:
    count = len(statistics)
    return MatrixStatistics(
        sum(s.rank for s in statistics) / count, sum(s.entropy for s in statistics) / count
    )


def tables_of(rotary_emb: tuple[Tensor, Tensor], batch: int, head: int) -> tuple[Tensor, Tensor]:
    """Tables of one sample and head, ``[N, d / 2]``."""
    cos, sin = (table.double().expand(*(1,) * max(0, 4 - table.ndim), *table.shape) for table in rotary_emb)
    return tuple(t[min(batch, len(t) - 1), min(head, t.shape[1] - 1)] for t in (cos, sin))  # type: ignore[return-value]


def audit_mixing(mixing: Tensor, start: Tensor, *, extra: bool = False) -> MixingAudit:
    """See :class:`MixingAudit`.

    Args:
        mixing: ``[M, M]`` or ``[H, M, M]``.
        start: ``[M, M]``.
        extra: whether the last row and column are of extra tokens.
    """
    mixing, start = mixing.detach().double().cpu(), start.double()
    sums = mixing.sum(-1)
    shares = (mixing[..., -1] / sums)[..., :-1]
    return MixingAudit(
        minimum=float(mixing.min()), maximum=float(mixing.max()), negatives=int((mixing < 0).sum()),
        row_sum_minimum=float(sums.min()), row_sum_maximum=float(sums.max()), row_entropy=_entropy(mixing),
        change=float((mixing - start).norm() / start.expand_as(mixing).norm()),
        extra_share=float(shares.mean()) if extra else None,
    )  # fmt: skip


def mixing_map(mixing: Tensor, layout: BlockLayout, *, gap: int = 1, side: int = 480) -> bytes:
    """Draw a PNG of a mixing matrix as in figure 4b of the paper; see :class:`LayerAnalysis`.

    Args:
        mixing: ``[M, M]``, or ``[H, M, M]``, of which the mean is drawn.
        layout: the blocks. That of extra tokens, which lies nowhere, is not drawn.
        gap: pixels between tiles, before scaling.
        side: of the longer side of the picture, in pixels, about.
    """
    weights = mixing.detach().float().cpu()
    weights = weights.mean(0) if weights.ndim == 3 else weights
    # Frames go beside each other: (F, H, W) is drawn as H x (F W).
    frames, height, width = ((1,) * 3 + layout.blocks)[-3:]
    weights = weights[: math.prod(layout.blocks), : math.prod(layout.blocks)]
    tiles = weights.reshape(frames, height, width, frames, height, width).permute(1, 0, 2, 4, 3, 5)
    tiles = tiles.reshape(height, frames * width, height, frames * width)
    low, high = min(0.0, float(tiles.min())), float(tiles.max())
    shades = ((tiles - low) / max(high - low, 1e-12) * 255).round().byte()
    rows, columns = height * (height + gap) - gap, frames * width * (frames * width + gap) - gap
    canvas = Image.new("RGB", (columns, rows), (128, 128, 128))
    for i in range(height):
        for j in range(frames * width):
            tile = Image.fromarray(shades[i, j].numpy()).convert("RGB")
            canvas.paste(_coloured(tile), (j * (frames * width + gap), i * (height + gap)))
    scale = max(1, side // max(canvas.size))
    canvas = canvas.resize((scale * columns, scale * rows), Image.Resampling.NEAREST)
    return written(canvas.save, "png")


def _coloured(tile: Image.Image) -> Image.Image:
    """Grey levels from dark blue over green to yellow."""
    return ImageOps.colorize(tile.convert("L"), black="#1d1147", mid="#2a9d8f", white="#fde725")
