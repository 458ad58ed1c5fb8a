"""Softmax windows in GPU kernels: :func:`mhla_diffusion.ops.window_attention` without packed copies.

As flash attention does (Dao, arXiv 2307.08691), with an online softmax that starts from the rest: q, k and v
are read where they are, through tables of the tokens of each block and of each window, and scores stay in
registers. The kernels (:mod:`mhla_diffusion.ops.gpu.window_kernels`):

- ``window``: the output, in float32, and the logarithm of its denominator;
- ``window_queries``: the gradients of q and of the rest;
- ``window_keys``: the gradients of k and v. With a margin a token is in several windows: its gradients in
  each are written apart, in the dtype of k and v, and ``window_sum`` adds them up.

Products are of the dtype of q, k and v, and of TF32 for float32 where ``torch.backends.cuda.matmul.
fp32_precision`` is "tf32"; scores and sums are float32. The output is kept in float32 for the backward, as
gradients of scores are small differences from its products. What a mask hides is not read. No atomics:
results do not change from run to run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import BlockLayout
from ..tiled import empty_in_order_of, new_gradient
from . import kernels
from .launch import Launcher, Meta, Target, target_of, vector_of

Rest = tuple[Tensor, Tensor] | None

_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# Rows and columns at a time, warps and stages, for heads up to 64 and 128 wide. 16 bits spill nothing, and
# float32 up to 40 bytes a thread; none was ever timed.
_TILES = {
    ("window", "16"): ((128, 64, 8, 3), (128, 64, 8, 2)),
    ("window_queries", "16"): ((64, 32, 4, 2), (64, 32, 4, 2)),
    ("window_keys", "16"): ((64, 32, 4, 2), (64, 32, 8, 2)),
    ("window", "32"): ((64, 32, 8, 2), (32, 32, 8, 2)),
    ("window_queries", "32"): ((32, 32, 4, 2), (16, 16, 8, 1)),
    ("window_keys", "32"): ((32, 32, 8, 2), (32, 16, 8, 1)),
}
# The same for heads of 72 to 96 channels in two tiles, but for these kernels by major numbers of compute
# capabilities.
_PARTED_TILES = {
    "window": (128, 64, 8, 2), "window_queries": (64, 32, 4, 2), "window_keys": (64, 32, 4, 2),
}  # fmt: skip
_NEVER_PARTED = (("window_keys", 8), ("window_keys", 12), ("window_queries", 10), ("window_queries", 12))
# What takes the place of these, by major numbers, 0 for AMD's.
_OTHER_TILES = {
    ("window", 8, "16", 128): (64, 64, 4, 2),
    ("window", 0, "16", 128): (64, 64, 4, 2),
    ("window_keys", 0, "16", 128): (64, 32, 4, 1),
    ("window_keys", 0, "32", 64): (32, 32, 4, 2),
}
_SUMMED = 4096  # numbers at a time
_LOG2_E = math.log2(math.e)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rest: Rest,
    mask: Tensor | None,
    layout: BlockLayout,
    margin: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Return the output, float32 ``[B, H, N, d_v]``, and the logarithm of its denominator, to base 2.

    Args:
        q, k: ``[B, H, N, d]``; v ``[B, H, N, d_v]``, of one dtype.
        rest: an output ``[B, H, N, d_v]`` and the logarithm of its denominator ``[B, H, N]``.
        mask: bool ``[B, N]``, true where a key counts.
        layout: without extra tokens.
        margin: tokens around a block along each axis.
    """
    out, log_den = empty_in_order_of(q, v.shape[-1], torch.float32), _new_numbers(q)
    far, log_sums = _rest_of(rest)
    _launch(
        "window", layout, margin, {"q": q, "k": k, "v": v, "far": far, "out": out},
        {"log_sums": log_sums, "log_den": log_den, "mask": mask},
    )  # fmt: skip
    return out, log_den


def backward(
    grad: Tensor,
    out: Tensor,
    log_den: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rest: Rest,
    mask: Tensor | None,
    layout: BlockLayout,
    margin: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v and of the rest, where there is one."""
    far, log_sums = _rest_of(rest)
    dq, dk, dv = (new_gradient(x) for x in (q, k, v))
    dfar = None if far is None else new_gradient(far)
    dlog_sums = None if far is None else _new_numbers(q)
    delta = _new_numbers(q)
    factors = {"q": q, "k": k, "v": v, "grad": grad}
    numbers = {"log_den": log_den, "delta": delta, "mask": mask}
    _launch(
        "window_queries", layout, margin, {**factors, "far": far, "out": out, "dq": dq, "dfar": dfar},
        {**numbers, "log_sums": log_sums, "dlog_sums": dlog_sums},
    )  # fmt: skip
    if not any(margin):
        _launch("window_keys", layout, margin, {**factors, "dk": dk, "dv": dv}, numbers)
        return dq, dk, dv, dfar, dlog_sums
    size = layout.num_blocks * layout.reach_size(margin)
    each_k, each_v = (x.new_empty(*x.shape[:2], size, x.shape[-1]) for x in (k, v))
    _launch("window_keys", layout, margin, {**factors, "dk": each_k, "dv": each_v}, numbers)
    for parts, dx in ((each_k, dk), (each_v, dv)):
        _launch("window_sum", layout, margin, {"parts": parts, "dx": dx}, {})
    return dq, dk, dv, dfar, dlog_sums


def _rest_of(rest: Rest) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if rest is None else (rest[0], rest[1].float().contiguous())


def _new_numbers(q: Tensor) -> Tensor:
    """A number for each query, ``[B, H, N]``."""
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def _launch(
    name: str,
    layout: BlockLayout,
    margin: tuple[int, ...],
    rows: Mapping[str, Tensor | None],
    numbers: Mapping[str, Tensor | None],
) -> None:
    """Run a kernel on rows of tokens, ``[B, H, N, *]``, and on numbers of them."""
    given = {key: x for key, x in rows.items() if x is not None}
    given = {key: x if x.stride(-1) == 1 else x.contiguous() for key, x in given.items()}
    first = next(iter(given.values()))
    mask = numbers.get("mask")
    target = target_of(first, first)
    plan = _plan(
        name, layout, margin, None if mask is None else mask.stride(), target, first.device,
        tuple((key, Meta(x.shape, x.stride(), x.dtype)) for key, x in given.items()),
    )  # fmt: skip
    tables = _tables(layout, margin, first.device)
    tensors: dict[str, Tensor | None] = {
        "table": tables.places if name == "window_sum" else tables.queries, "key_table": tables.keys,
        **dict.fromkeys(rows), **given, **numbers,
    }  # fmt: skip
    plan.launcher(*[tensors[each] for each in plan.tensors])


class _Plan(NamedTuple):
    """How a kernel is launched: names of its tensors, and what launches it."""

    tensors: list[str]
    launcher: Launcher


@functools.lru_cache(maxsize=1024)
def _plan(
    name: str,
    layout: BlockLayout,
    margin: tuple[int, ...],
    mask: tuple[int, ...] | None,
    target: Target,
    device: torch.device,
    tensors: tuple[tuple[str, Meta], ...],
) -> _Plan:
    """All that does not depend on what tensors hold, on one device, which compiles for itself."""
    rows = dict(tensors)
    x = tensors[0][1]
    batch, heads, _, width = x.shape
    values = rows.get("v", x)
    blocks, size, key_size = layout.num_blocks, layout.block_size, layout.reach_size(margin)
    numbers: dict[str, Any] = {
        f"{key}_{axis}": stride
        for key in (*rows, "far", "dfar")
        for axis, stride in zip("bhn", rows[key].stride if key in rows else (0, 0, 0), strict=False)
    }
    numbers |= dict(zip(("mask_b", "mask_n"), mask or (0, 0), strict=True))
    root = 1 / math.sqrt(width)
    numbers |= {
        "heads": heads, "blocks": blocks, "tokens": layout.num_tokens, "size": size, "key_size": key_size,
        "scale": root * _LOG2_E, "root": root,
    }  # fmt: skip
    steps = [y.stride[2] for y in rows.values()]
    far = max(blocks * key_size, layout.num_tokens) * max(steps)
    constants = {
        "REST": "far" in rows, "MASK": mask is not None, "APART": any(margin), "WIDTH": width,
        "CHANNELS": values.shape[-1], "VEC": vector_of(*rows.values()),
        "PLACE": tl.int32 if far < 2**31 else tl.int64,
    }  # fmt: skip
    if name == "window_sum":
        d = triton.next_power_of_2(width)
        most = _tables(layout, margin, device).places.shape[1]
        tile: dict[str, Any] = {"ROWS": max(16, _SUMMED // d), "D": d, "MOST": most, "num_warps": 4}
        programs = batch * heads * -(-layout.num_tokens // tile["ROWS"])
    else:
        mine, others = (key_size, size) if name == "window_keys" else (size, key_size)
        tile = _tile_of(name, width, values.shape[-1], x.dtype, target, mine, others)
        programs = batch * heads * blocks * -(-mine // tile["ROWS"])
    arguments = getattr(kernels, f"{name}_kernel").arg_names
    names = arguments[: arguments.index(f"{'parts' if name == 'window_sum' else 'q'}_b")]
    return _Plan(names, Launcher(f"{name}_kernel", programs, {**numbers, **constants, **tile}))


def _tile_of(
    name: str, width: int, channels: int, dtype: torch.dtype, target: Target, rows: int, columns: int
) -> dict[str, Any]:
    """Compile-time options: what is multiplied, and how much of it at a time, no more than there is."""
    d, dv = (max(16, triton.next_power_of_2(size)) for size in (width, channels))
    kind, most, tail = str(8 * dtype.itemsize), max(64, d, dv), 0
    parted = kind == "16" and width == channels and width % 8 == 0 and 64 < width <= 96
    if parted and (name, target.major) not in _NEVER_PARTED:
        d, dv, tail = 64, 64, max(16, triton.next_power_of_2(width - 64))
        tile = _PARTED_TILES[name]
    else:
        tile = _TILES[name, kind][(64, 128).index(most)]
        tile = _OTHER_TILES.get((name, target.major, kind, most), tile)
    most_rows, most_columns, warps, stages = tile
    return {
        "OPERAND": _OPERANDS[dtype], "PRECISION": "tf32" if target.major and target.tf32 else "ieee",
        "ROWS": min(most_rows, max(16, triton.next_power_of_2(rows))),
        "COLUMNS": min(most_columns, max(16, triton.next_power_of_2(columns))),
        "D": d, "DV": dv, "TAIL": tail, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


class _Tables(NamedTuple):
    """Tokens of blocks and of windows, int32 ``[M, *]``, and places of each token in windows, ``[N, *]``.

    -1 stands where there is none.
    """

    queries: Tensor
    keys: Tensor
    places: Tensor


@functools.lru_cache(maxsize=64)
def _tables(layout: BlockLayout, margin: tuple[int, ...], device: torch.device) -> _Tables:
    queries, keys = (token.where(there, -1) for token, there in (layout.reach(0), layout.reach(margin)))
    place = (keys.flatten() >= 0).nonzero()[:, 0]
    token, order = keys.flatten()[place].sort(stable=True)
    starts = torch.searchsorted(token, torch.arange(layout.num_tokens))
    rank = torch.arange(len(token)) - starts[token]
    places = token.new_full((layout.num_tokens, int(rank.max()) + 1), -1)
    places[token, rank] = place[order]
    return _Tables(*(x.int().contiguous().to(device) for x in (queries, keys, places)))
