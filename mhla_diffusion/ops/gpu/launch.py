"""How the kernels of :mod:`mhla_diffusion.ops.gpu.kernels` are launched: programs, tiles and arguments.

A model launches the same kernels on the same shapes again and again, and on small ones the processor is what
takes the time. So all that does not depend on what tensors hold is found once, with the compiled kernel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from ..features import Features
from ..layout import BlockLayout
from . import kernels

# Programs that keep a GPU of 132 multiprocessors at work. Long blocks are shared by several programs, each
# with at least _FEWEST tokens, until there are so many; summaries by fewer, as their parts have to be added.
_PROGRAMS = {"outer": 264, "inner": 1024, "queries": 1024, "keys": 1024}
_FEWEST = 128


class Launcher:
    """Kernel on so many programs, with all its arguments but tensors, which are the first.

    What was compiled for a launch runs the next one as it is, on pointers, where Triton would look at all
    arguments to find it. It stands for tensors that begin at the same place between multiples of 16 bytes:
    all else that Triton compiles for is the same, dtypes too.

    Args:
        kernel: its name.
        programs: at least one, or nothing is launched.
        arguments: by name, and options of Triton.
    """

    def __init__(self, kernel: str, programs: int, arguments: dict[str, Any]) -> None:
        names = getattr(kernels, kernel).arg_names
        self._kernel, self._programs = kernel, programs
        self._arguments = {name: value for name, value in arguments.items() if name in {*names, *_OPTIONS}}
        self._numbers = [arguments[name] for name in names if name in arguments]
        self._compiled: dict[tuple[int | None, ...], Callable[..., None]] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current device and stream; None for a tensor that there is not."""
        if not self._programs:
            return
        pointers = [None if y is None else y.data_ptr() for y in tensors]
        places = tuple([at and at % 16 for at in pointers])
        run = self._compiled.get(places)
        if run is not None:
            run(*pointers, *self._numbers)
            return
        compiled = getattr(kernels, self._kernel)[(self._programs,)](*tensors, **self._arguments)
        # On AMD's GPUs it stands for tensors of one size as well. An interpreter compiles nothing.
        if isinstance(compiled, CompiledKernel) and torch.version.hip is None:
            self._compiled[places] = compiled[(self._programs, 1, 1)]


_OPTIONS = ("num_warps", "num_stages", "maxnreg")


def launch(
    name: str,
    tokens: tuple[Tensor, ...],
    summaries: Tensor,
    sums: Tensor,
    layout: BlockLayout,
    features: Features,
    *,
    centre: Tensor | None = None,
    dtype: torch.dtype | None = None,
    parts: int | None = None,
    saturate: bool = False,
    norm: Tensor | None = None,
    out_norm: Tensor | None = None,
    gate: Tensor | None = None,
    norm_eps: float = 0.0,
    **given: Tensor | None,
) -> None:
    """Run a kernel on x, v and, in the backward, what is written of their gradients.

    ``dtype`` is that of the summaries in the end, where these are parts of them; ``parts`` how many programs
    share a block; ``saturate`` whether outputs beyond float16 become its largest number; ``norm`` weights of
    the norm of x, ``out_norm`` of that of outputs, ``gate`` what these are gated by; ``given`` tensors that
    only this kernel takes.
    """
    if tokens[0].stride(-1) != 1 or tokens[1].stride(-1) != 1:
        assert name != "inner" or tokens[1].stride(-1) == 1, "outputs have their channels side by side"
        tokens = *(y if y.stride(-1) == 1 else y.contiguous() for y in tokens[:2]), *tokens[2:]
    norm, out_norm, gate = (
        y if y is None or y.stride(-1) == 1 else y.contiguous() for y in (norm, out_norm, gate)
    )
    x, v = tokens[:2]
    rotary, mask = features.rotary, features.mask
    if rotary is not None:
        rotary = rotary.float().expand(*x.shape[:-1], -1)
        rotary = rotary if rotary.stride(-1) == 1 else rotary.contiguous()
    if centre is not None and not centre.shape[-1]:
        centre = None
    plan = _plan(
        name, features.feature_map, features.eps, features.normalized, centre is not None,
        given.get("den_grad") is not None, given.get("own_grad") is not None, saturate,
        dtype or summaries.dtype, summaries.shape, sums.shape[-1], parts or parts_of(name, x, layout),
        None if rotary is None else rotary.stride(),
        None if mask is None else (mask.stride(), mask.dtype), x.device, target_of(x, v),
        None if norm is None else norm.dtype, None if out_norm is None else out_norm.dtype,
        None if gate is None else (gate.shape, gate.stride(), gate.dtype), norm_eps,
        *[(y.shape, y.stride(), y.dtype) for y in tokens],
    )  # fmt: skip
    order, starts = _order(layout, x.device, plan.blocks)
    tensors: dict[str, Any] = {
        "summaries": summaries, "sums": row_of_sums(summaries, sums), "order": order, "starts": starts,
        "centre": centre, "rotary": rotary, "mask": mask, "den": None, "den_grad": None, "own_grad": None,
        "norm": norm, "out_norm": out_norm, "gate": gate,
        **dict(zip(_TOKENS, tokens, strict=False)), **given,
    }  # fmt: skip
    plan.launcher(*[tensors[name] for name in plan.tensors])


# Names of what kernels take of tokens, and of all their tensors.
_TOKENS = ("x", "v", "dx", "dv")
_TENSORS = {
    *_TOKENS, "summaries", "sums", "matrix_grads", "sum_grads", "centre", "den", "den_grad", "own_grad",
    "order", "starts", "rotary", "mask", "norm", "out_norm", "gate",
}  # fmt: skip


def row_of_sums(summaries: Tensor, sums: Tensor) -> Tensor:
    """Return the sums where they are: apart, or the last row of the summaries."""
    return sums if sums.shape[-1] else summaries[..., -1, :]


class _Plan(NamedTuple):
    """How a kernel is launched: number of blocks, names of its tensors, and what launches it."""

    blocks: int
    tensors: list[str]
    launcher: Launcher


class Meta(NamedTuple):
    """Shape, strides and dtype of a tensor, which plans are made by."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@functools.lru_cache(maxsize=1024)
def _plan(
    name: str,
    feature_map: str,
    eps: float,
    normalized: bool,
    centred: bool,
    quotient: bool,
    own_grad: bool,
    saturate: bool,
    dtype: torch.dtype,
    summaries: torch.Size,
    sums: int,
    parts: int,
    rotary: tuple[int, ...] | None,
    mask: tuple[tuple[int, ...], torch.dtype] | None,
    device: torch.device,
    target: Target,
    norm: torch.dtype | None,
    out_norm: torch.dtype | None,
    gate: tuple[Any, ...] | None,
    norm_eps: float,
    *tensors: tuple[Any, ...],
) -> _Plan:
    """All that does not depend on what tensors hold, on one device, which compiles for itself."""
    tokens = [Meta(*y) for y in tensors]
    gates = [] if gate is None else [Meta(*gate)]
    x, v = tokens[:2]
    batch, heads, length, width = x.shape
    held = how_held(feature_map, turned=rotary is not None, normalized=normalized)
    tile = dict(tile_of(name, width, v.shape[-1], x.dtype, v.dtype, dtype, target, *held))
    size = math.prod(summaries[-2:])
    numbers: dict[str, float] = {
        f"{name}_{axis}": stride
        for name, y in zip(_TOKENS, tokens, strict=False)
        for axis, stride in zip("bhn", y.stride, strict=False)
    }
    numbers |= dict(zip(("r_b", "r_h", "r_n"), rotary or (0, 0, 0), strict=False))
    numbers |= dict(zip(("mask_b", "mask_n"), mask[0] if mask else (0, 0), strict=False))
    numbers |= dict(
        zip(("gate_b", "gate_h", "gate_n"), gates[0].stride if gates else (0, 0, 0), strict=False)
    )
    numbers |= {
        "summary_stride": size, "sums_stride": sums or size, "heads": heads, "blocks": summaries[2],
        "parts": parts, "tokens": length, "eps": eps, "norm_eps": norm_eps,
    }  # fmt: skip
    constants = {
        "QUOTIENT": quotient, "SUMS": own_grad, "NORMALIZED": normalized, "CENTRED": centred,
        "SATURATE": saturate, "FEATURE_MAP": feature_map, "ROTARY": rotary is not None,
        "MASK": mask is not None, "NORM": norm is not None, "OUT_NORM": out_norm is not None,
        "GATE": gate is not None, "WIDTH": width, "CHANNELS": v.shape[-1],
        "X_VEC": vector_of(x, *tokens[2:3]), "V_VEC": vector_of(v, *tokens[3:], *gates),
        # Rows that threads of 4 warps cover with 16 bytes each.
        "KEPT": min(tile["ROWS"], max(8, 1024 // tile["D"])),
    }  # fmt: skip
    if tile["OPERAND"] == tl.bfloat16 and tile["D"] <= 128 and tile["num_warps"] == 8 and target.major:
        # More than that is needed for other features and for masks, and but for 9.0 for norms and gates.
        few = feature_map == "relu" and mask is None and (target.major == 9 or not (norm or out_norm or gate))
        tile |= {"maxnreg": _REGISTERS} if few else {}
    assert out_norm is None or tile["TILES"] == 1, "the norm of outputs sees whole rows"
    steps = [y.stride[2] for y in (*tokens, *gates)] + [rotary[2] if rotary else 0, mask[0][1] if mask else 0]
    constants["PLACE"] = tl.int32 if length * max(steps) < 2**31 else tl.int64
    names = [argument for argument in getattr(kernels, f"{name}_kernel").arg_names if argument in _TENSORS]
    assert mask is None or "mask" in names, "masks are of keys"
    split = tile["TILES"] if name in ("outer", "inner") else 1
    programs = batch * heads * summaries[2] * parts * split
    arguments = {**numbers, **constants, **tile}
    return _Plan(summaries[2], names, Launcher(f"{name}_kernel", programs, arguments))


def vector_of(*tensors: Meta) -> int:
    """Return the largest power of two, up to 8, that all rows of the tensors start at multiples of."""
    return math.gcd(8, *(stride for x in tensors for stride in x.stride[:3]))


def parts_of(name: str, x: Tensor, layout: BlockLayout) -> int:
    """Return how many programs share a block."""
    return _parts(name, x.shape[0] * x.shape[1], layout)


@functools.lru_cache(maxsize=1024)
def _parts(name: str, rows: int, layout: BlockLayout) -> int:
    """How many programs share a block, for so many samples times heads."""
    most = layout.block_size // _FEWEST
    return max(1, min(most, -(-_PROGRAMS[name] // max(1, rows * layout.num_blocks))))


class Target(NamedTuple):
    """GPU: major number of its compute capability, 0 for AMD's; and whether float32 may be TF32."""

    major: int
    tf32: bool


def target_of(x: Tensor, v: Tensor) -> Target:
    """Return that of two factors; for what is not on a GPU, an H100's."""
    exact = torch.float32 in (x.dtype, v.dtype)
    return Target(_major(x.device), exact and torch.backends.cuda.matmul.fp32_precision == "tf32")


@functools.cache
def _major(device: torch.device) -> int:
    if torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


# Tokens at a time, warps and stages, for heads up to 64, 128 and 256 wide. Those of bfloat16 up to 128 were
# the fastest on an H200, or within 5 % of it, of 16 to 128 tokens, 2 to 8 warps and 1 to 3 stages, at the
# shapes of scripts/gpu_validate.py. What counts is how many programs fit a multiprocessor, as most of the
# time is spent waiting for memory.
_TILES = {
    ("outer", "bf16"): ((64, 4, 2), (32, 4, 1), (32, 8, 2)),
    ("inner", "bf16"): ((64, 4, 2), (64, 8, 1), (32, 8, 2)),
    ("queries", "bf16"): ((64, 4, 1), (16, 4, 3), (32, 8, 2)),
    ("keys", "bf16"): ((64, 4, 2), (64, 8, 1), (32, 8, 1)),
    ("outer", "tf32"): ((32, 4, 2), (16, 8, 2), (16, 8, 2)),
    ("inner", "tf32"): ((32, 4, 2), (32, 8, 2), (16, 8, 2)),
    ("queries", "tf32"): ((32, 4, 2), (32, 8, 2), (16, 8, 2)),
    ("keys", "tf32"): ((32, 4, 2), (32, 8, 2), (16, 4, 1)),
    ("outer", "ieee"): ((16, 8, 2), (16, 8, 2), (16, 8, 2)),
    ("inner", "ieee"): ((32, 8, 2), (32, 8, 2), (16, 8, 2)),
    ("queries", "ieee"): ((32, 8, 2), (32, 8, 2), (16, 8, 2)),
    ("keys", "ieee"): ((16, 4, 1), (16, 8, 2), (32, 8, 1)),
}
# The same for heads of 72, 80 and 88 channels in two tiles; never timed.
_PARTED_TILES = {"outer": (32, 4, 1), "inner": (64, 4, 2), "queries": (64, 4, 1), "keys": (64, 4, 2)}
# What takes the place of these on other GPUs than those of compute capability 9.0, where they would spill; by
# its major number, 0 for AMD's.
_OTHER_TILES = {
    (8, "outer", "bf16", 128): (16, 4, 1), (8, "inner", "bf16", 128): (32, 4, 1),
    (8, "keys", "bf16", 128): (32, 8, 1), (8, "queries", "bf16", 64): (32, 4, 1),
    (10, "outer", "bf16", 64): (32, 8, 1), (10, "outer", "bf16", 80): (32, 8, 1),
    (10, "inner", "bf16", 128): (64, 8, 2), (10, "keys", "bf16", 128): (32, 8, 1),
    (10, "queries", "bf16", 64): (32, 4, 1),
    (12, "outer", "bf16", 128): (16, 4, 1), (12, "inner", "bf16", 128): (32, 4, 1),
    (12, "queries", "bf16", 64): (32, 4, 1), (12, "queries", "tf32", 64): (32, 8, 2),
    (0, "inner", "bf16", 256): (16, 8, 1), (0, "inner", "ieee", 256): (16, 4, 1),
    (0, "keys", "bf16", 256): (16, 8, 1),
    (0, "queries", "ieee", 64): (16, 8, 1), (0, "queries", "ieee", 128): (16, 8, 1),
    (0, "keys", "ieee", 256): (16, 4, 1),
}  # fmt: skip
# The largest summary that a program holds beside all else of the queries. In bfloat16 on an H200 a larger
# one, though fewer programs fit, takes an eighth less time than two kernels.
_MOST_HELD = 64 * 64
_MOST_HELD_NARROW = {9: 128 * 128}
# Registers of a thread of 8 warps, so that two programs fit.
_REGISTERS = 128


def how_held(feature_map: str, *, turned: bool, normalized: bool) -> tuple[bool, bool]:
    """Return whether a row may be held in two tiles, and whether products may find the sums."""
    return not turned and feature_map != "softmax", not turned and normalized


def holds_whole_rows(q: Tensor, norm: Tensor, summaries: torch.dtype, features: Features) -> bool:
    """Return whether a program that reads queries holds all channels of their outputs, which ``norm`` has."""
    held = how_held(features.feature_map, turned=features.rotary is not None, normalized=features.normalized)
    target = Target(_major(q.device), False)
    tile = tile_of("inner", q.shape[-1], norm.shape[-1], q.dtype, q.dtype, summaries, target, *held)
    return tile["TILES"] == 1


@functools.lru_cache(maxsize=1024)
def tile_of(
    name: str,
    width: int,
    channels: int,
    x: torch.dtype,
    v: torch.dtype,
    summaries: torch.dtype,
    target: Target,
    parted: bool,
    beside: bool,
) -> Mapping[str, Any]:
    """Return compile-time options: what is multiplied, and how much of it at a time.

    The sizes keep accumulators in registers and shared memory within the 99 KB of the smallest GPUs (compute
    capabilities 8.6, 8.9 and 12.0): scripts/check_kernels.py compiles all of them. parted and beside: see
    :func:`how_held`.
    """
    d, held = (max(16, triton.next_power_of_2(size)) for size in (width, channels))
    factors = (x,) if name == "inner" else (x, v)
    narrow = summaries == torch.bfloat16 or all(dtype == torch.bfloat16 for dtype in factors)
    most = (128 if d <= 128 else 64) if narrow else (64 if d <= 64 else 32)
    held = min(held, most)
    tiles = -(-channels // held)
    precision = "ieee" if narrow else _precision(factors, target)
    tail, tail_v = _tails(width, channels, parted, beside) if narrow and d <= 128 else (0, 0)
    if tail:
        d, held, tiles = 64, 64, 1
    kind, size = "bf16" if narrow else precision, d + tail if tail else max(64, d, held)
    tile = _PARTED_TILES[name] if tail else _TILES[name, kind][(64, 128, 256).index(size)]
    rows, warps, stages = _OTHER_TILES.get((target.major, name, kind, size), tile)
    options = {
        "OPERAND": tl.bfloat16 if narrow else tl.float32, "PRECISION": precision, "TAIL": tail,
        "ROWS": rows, "D": d, "DV": held, "TILES": tiles, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
    if name in ("outer", "inner"):
        options |= {"TAIL_V": tail_v, "FREE": max(channels, held * tiles)}
    if name == "queries":
        exact = not narrow and precision == "ieee"
        # Gradients of float32, of an output that was asked for in it or goes on in a window, leave too few
        # registers.
        most = _MOST_HELD_NARROW.get(target.major, _MOST_HELD) if v == torch.bfloat16 else _MOST_HELD
        options["FUSED"] = d * held <= most and tiles == 1 and not tail and not exact
    return options


def _tails(width: int, channels: int, parted: bool, beside: bool) -> tuple[int, int]:
    """Channels of x and of v in a second tile; three more of v are for sums beside them."""
    more, sums = width - 64, 3 * beside
    if parted and width == channels and width % 8 == 0 and 0 < more <= 32 - sums:
        return max(16, triton.next_power_of_2(more)), max(16, triton.next_power_of_2(more + sums))
    return 0, 16 * beside


def _precision(factors: tuple[torch.dtype, ...], target: Target) -> str:
    """How float32 numbers are multiplied that stand for such tensors; few of AMD's devices have TF32."""
    return "tf32" if target.major and (target.tf32 or torch.float32 not in factors) else "ieee"


@functools.lru_cache(maxsize=64)
def _order(layout: BlockLayout, device: torch.device, blocks: int) -> tuple[Tensor, Tensor]:
    """Tokens by block, ``[N]``, and where each block starts among them, or would, ``[blocks + 1]``; int32."""
    index = layout.block_index(device)
    starts = torch.searchsorted(index.sort().values, torch.arange(blocks + 1, device=device))
    return index.argsort(stable=True).int(), starts.int()
