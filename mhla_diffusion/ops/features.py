"""What happens to queries and keys before they are summed: feature map, rotary embedding, checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import BlockLayout

NORMALIZERS = ("paper", "official", "none")

RotaryEmbedding = tuple[Tensor, Tensor]


class FeatureMap(NamedTuple):
    """Positive map of rows ``[..., d]``, in every form that a path needs.

    Args:
        forward: ``(x, eps)`` to ``y = phi(x)``, differentiable any number of times.
        into: ``(out, x, eps)``: the same written into ``out``, which may have a wider dtype.
        backward: ``(grad, x, y, out)``: the gradient of x, written into ``out``, from that of y.
    """

    forward: Callable[[Tensor, float], Tensor]
    into: Callable[[Tensor, Tensor, float], object]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor], object]


def _relu_into(out: Tensor, x: Tensor, eps: float) -> None:
    torch.clamp_min(x if x.dtype == out.dtype else out.copy_(x), 0, out=out).add_(eps)


def _relu_backward(grad: Tensor, x: Tensor, y: Tensor, out: Tensor) -> None:
    torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)


def _elu(x: Tensor, eps: float) -> Tensor:
    # Not elu(x) + 1, which is 0 below -17 in float32.
    return x.clamp_max(0).exp() + F.relu(x)


def _elu_into(out: Tensor, x: Tensor, eps: float) -> None:
    out.copy_(x).clamp_max_(0).exp_().add_(F.relu(x))


# The one list of feature maps: what is not in it is an error on every path. Triton's kernels, which cannot
# read it, have a branch for each (gpu/pieces.py) and say so where they lack one.
_MAPS = {
    "relu": FeatureMap(lambda x, eps: F.relu(x) + eps, _relu_into, _relu_backward),
    "elu": FeatureMap(_elu, _elu_into, lambda grad, x, y, out: torch.mul(grad, y.clamp_max(1), out=out)),
    "softmax": FeatureMap(
        lambda x, eps: x.softmax(-1),
        lambda out, x, eps: out.copy_(x.softmax(-1, dtype=out.dtype)),
        lambda grad, x, y, out: out.copy_(y * (grad - (grad * y).sum(-1, keepdim=True))),
    ),
}
FEATURE_MAPS = tuple(_MAPS)


def feature_map_of(name: str) -> FeatureMap:
    """Feature map of that name.

    Raises:
        ValueError: for a name that is not in ``FEATURE_MAPS``.
    """
    if name not in _MAPS:
        raise ValueError(f"feature_map {name!r} is not one of {', '.join(FEATURE_MAPS)}")
    return _MAPS[name]


def phi(x: Tensor, feature_map: str, *, eps: float) -> Tensor:
    """Positive feature map: ``relu(x) + eps``, ``elu(x) + 1`` or a softmax over the last axis."""
    return feature_map_of(feature_map).forward(x, eps)


def check_eps(eps: float) -> None:
    """Refuse what would make features negative or not finite, with a ValueError."""
    if not 0 <= eps < 1:
        raise ValueError(f"eps must be a number from 0 to less than 1, got {eps!r}")


@dataclass(frozen=True)
class Features:
    """Map from rows of q or k to features.

    Args:
        feature_map, eps: see :func:`mhla_diffusion.ops.mhla`.
        normalized: whether there is a denominator, and so sums of the features of the keys.
        rotary: ``[..., N, d]``, broadcastable to q and k: cosine and sine of each pair, side by side.
        mask: bool ``[B, N]``, true where a row counts.
        shared: whether summaries will be added to those of other ranks: then they are of values as they are,
            in float32, on every path.
        scaled: whether rows of W are brought to one size, which a quotient does not see. Denominators that
            are asked for themselves are of W as it is.
    """

    feature_map: str
    eps: float
    normalized: bool
    rotary: Tensor | None = None
    mask: Tensor | None = None
    shared: bool = False
    scaled: bool = True

    def __post_init__(self) -> None:
        check_eps(self.eps)


def turn_all(rotary_emb: RotaryEmbedding, tokens: int, extra: tuple[int, int] | None) -> RotaryEmbedding:
    """Tables ``[..., N, d / 2]`` of all tokens, from those of the grid's alone: extra ones are not turned."""
    if extra is None or rotary_emb[0].shape[-2] == tokens:
        return rotary_emb
    cos, sin = rotary_emb
    return F.pad(cos, (0, 0, *extra), value=1.0), F.pad(sin, (0, 0, *extra))


def apply_rotary_emb(x: Tensor, rotary_emb: RotaryEmbedding) -> Tensor:
    """Rotate the pairs ``(x[..., 2i], x[..., 2i + 1])``.

    Args:
        x: ``[..., N, d]``.
        rotary_emb: cosines and sines, each ``[N, d / 2]`` or broadcastable to ``[..., N, d / 2]``.
    """
    cos, sin = (table.to(x.dtype) for table in rotary_emb)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def turned(
    q: Tensor, k: Tensor, rotary_emb: RotaryEmbedding | None, layout: BlockLayout
) -> tuple[Tensor, Tensor]:
    """Return queries and keys ``[B, H, N, d]`` as a softmax has them: with positions, if there are any."""
    if rotary_emb is None:
        return q, k
    tables = turn_all(rotary_emb, layout.num_tokens, layout.extra)
    return apply_rotary_emb(q, tables), apply_rotary_emb(k, tables)


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    layout: BlockLayout,
    key_layout: BlockLayout | None = None,
    *,
    feature_map: str = "relu",
    normalizer: str = "paper",
    rotary_emb: RotaryEmbedding | None = None,
    key_mask: Tensor | None = None,
) -> None:
    """Refuse what :func:`mhla` cannot compute, with a ValueError that names the value and the remedy."""
    feature_map_of(feature_map)
    for name, given in (("layout", layout), ("key_layout", key_layout or layout)):
        if not isinstance(given, BlockLayout):
            raise ValueError(f"{name} must be a BlockLayout(grid, blocks), got {given!r}")
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer {normalizer!r} is not one of {', '.join(NORMALIZERS)}")
    _check_tensors(q, k, v, mixing, layout, key_layout or layout)
    if normalizer == "official" and not layout.is_even:
        found = f"the grid {layout.grid} is not a multiple of the blocks {layout.blocks}"
        if layout.extra is not None:
            found = "extra tokens are a block of their own"
        raise ValueError(
            "normalizer 'official' pairs tokens by their place inside a block and needs equal blocks, but "
            f"{found}; use normalizer='paper'"
        )
    if key_layout is not None and (rotary_emb is not None or normalizer == "official"):
        raise ValueError(
            "keys of another grid (key_layout) have no positions or places in common with the queries: leave "
            "rotary_emb out, and take normalizer 'paper' or 'none'"
        )
    check_rotary(rotary_emb, q, extra=sum(layout.extra or ()))
    check_key_mask(key_mask, k)


def check_rotary(rotary_emb: RotaryEmbedding | None, q: Tensor, *, extra: int = 0) -> None:
    """Refuse tables that are not of all tokens, or of all but the extra ones, with a ValueError."""
    if rotary_emb is None:
        return
    if (
        not isinstance(rotary_emb, (tuple, list))
        or len(rotary_emb) != 2
        or any(not isinstance(table, Tensor) or not table.is_floating_point() for table in rotary_emb)
    ):
        raise ValueError(
            "rotary_emb must be a pair of real tensors (cos, sin); of complex factors x pass (x.real, x.imag)"
        )
    tokens, d = q.shape[-2:]
    for table in rotary_emb:
        *outer, rows, columns = table.shape if table.ndim > 1 else (0, 0)
        wholes = q.shape[-2 - len(outer) : -2]
        # torch.compile of torch 2.9 takes no generators, and finds no symbolic size in a tuple.
        spread = [n == 1 or n == whole for n, whole in zip(outer, wholes, strict=False)]
        fits = (rows == tokens or rows == tokens - extra) and columns == d // 2 and not d % 2
        if not fits or len(outer) > 2 or not all(spread):
            raise ValueError(
                f"rotary_emb must be (cos, sin), each [N, d / 2], [H, N, d / 2] or [B, H, N, d / 2] with "
                f"B or H of 1 or all, of q {tuple(q.shape)} with d even or of its tokens on the grid alone, "
                f"got {tuple(table.shape)}"
            )
        if table.device != q.device:
            raise ValueError(f"rotary_emb is on {table.device} and q on {q.device}: move it there")
        if table.requires_grad:
            raise ValueError("rotary_emb gets no gradient; pass tables that do not require one")


def check_key_mask(key_mask: Tensor | None, k: Tensor) -> None:
    """Refuse a mask that is not bool ``[B, N]`` for keys ``[B, H, N, d]``, with a ValueError."""
    if key_mask is not None and not isinstance(key_mask, Tensor):
        raise ValueError(f"key_mask must be a bool tensor [B, N], got a {type(key_mask).__name__}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (len(k), k.shape[2])):
        raise ValueError(
            f"key_mask must be a bool tensor [B, N] = [{len(k)}, {k.shape[2]}], true where a key counts, got "
            f"{key_mask.dtype} {tuple(key_mask.shape)}"
        )
    if key_mask is not None and key_mask.device != k.device:
        raise ValueError(f"key_mask is on {key_mask.device} and k on {k.device}: move it there")


def check_tokens(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, key_layout: BlockLayout) -> None:
    """Refuse queries, keys and values that do not fit each other or their grids, with a ValueError."""
    # Messages are built on failure alone: torch.compile cannot print the sizes of dynamic shapes.
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"q, k and v must be [B, H, N, d], with the same B, H, N for k and v, got {_shapes(q, k, v)}"
        )
    if q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same B, H and d, got {_shapes(q, k, v)}")
    for name, x, on in (("q", q, layout), ("k and v", k, key_layout)):
        if x.shape[2] != on.num_tokens:
            raise ValueError(f"{name} hold {x.shape[2]} tokens, but {on.counted_tokens()}")


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, mixing: Tensor, layout: BlockLayout, key_layout: BlockLayout
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("mixing", mixing)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    check_tokens(q, k, v, layout, key_layout)
    size = layout.num_blocks, key_layout.num_blocks
    allowed = (*q.shape[:2], *size)[4 - mixing.ndim :] if 2 <= mixing.ndim <= 4 else ()
    # Size by size: what hashes a shape, or compares a batch with blocks, has a compiler fix the batch size.
    if not allowed or any(n != m for n, m in zip(mixing.shape, allowed, strict=True)):
        raise ValueError(
            f"mixing must be [M, M_k], [H, M, M_k] or [B, H, M, M_k] with M = {size[0]} (blocks "
            f"{_blocks(layout)}), M_k = {size[1]} (blocks {_blocks(key_layout)}), H = {q.shape[1]} and "
            f"B = {q.shape[0]}, got {tuple(mixing.shape)}"
        )
    for name, x in (("q", q), ("k", k), ("v", v), ("mixing", mixing)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must have a floating-point dtype, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"q is on {q.device}, but {name} on {x.device}; move them to one device")


def _blocks(layout: BlockLayout) -> str:
    return f"{layout.blocks}{'' if layout.extra is None else ' and that of extra tokens'}"


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)
