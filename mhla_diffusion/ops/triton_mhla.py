"""GPU kernels for :mod:`mhla_diffusion.ops.tiled`: the same four functions, blocks gathered in registers.

Three kernels do everything (:mod:`mhla_diffusion.ops.triton_kernels`):

- ``outer``, summaries of values and features: the forward of ``summarize``, and the gradient of the mixed
  summaries in ``read``;
- ``inner``, products of features and summaries: the forward of ``read``, and the gradient of v;
- ``rows``, the gradient of q or k, through rotation and feature map.

Mixing is a product of matrices and torch's, which is several times slower where sizes are no multiples of 8:
many blocks are filled up with empty ones. All sums are float32. What is multiplied is

- bfloat16 where q, k and v are: features and summaries are rounded to it, and summaries stored in it, with
  the sums of features apart, in float32;
- TF32 for float16, which it holds; features after rotation and summaries are rounded to it;
- float32 for float32, or TF32 where ``torch.backends.cuda.matmul.fp32_precision`` is "tf32".

Denominators are float32 throughout. Values that have a mean would make that rounding costly: gradients of q
and W are small differences. So values are centred where the output then only moves by as much, ``o(v - m) +
m = o(v)``: where there is a denominator and no rotation. Values of one give exactly one.

Head widths that are no power of two are padded to the next in registers, and no more bytes are moved. No
atomics: results do not change from run to run.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_kernels as kernels
from .composite import mix
from .features import Features
from .layout import BlockLayout
from .tiled import new_gradient, new_outputs

# Programs that keep a GPU of 132 multiprocessors at work. Long blocks are shared by several programs, each
# with at least _FEWEST tokens, until there are so many; summaries by fewer, as their parts have to be added.
_PROGRAMS = {"outer": 264, "inner": 1024, "rows": 1024}
_FEWEST = 128
# Up to so many blocks, products of mixing are too short for their sizes to matter.
_FEW_BLOCKS = 64
# Tokens whose mean stands for that of all values, and what a program reads of them at a time. Fewer would
# leave a mean that is larger than most outputs where values have none.
_SAMPLE = 2048
_CENTRE_TILE = {"ROWS": 128, "DV": 32, "num_warps": 4, "num_stages": 3}


def summarize(k: Tensor, v: Tensor, layout: BlockLayout, features: Features) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mhla_diffusion.ops.tiled.summarize`."""
    summaries, sums, centre = new_summaries(k, v, layout, features)
    if centre.shape[-1]:
        _centre(v, features.mask, out=centre)
    _outer(k, v, summaries, sums, layout, features, centre=centre)
    return summaries, sums, centre


def summarize_backward(
    grad: Tensor,
    grad_sums: Tensor,
    k: Tensor,
    v: Tensor,
    centre: Tensor,
    layout: BlockLayout,
    features: Features,
) -> tuple[Tensor, Tensor]:
    """See :func:`mhla_diffusion.ops.tiled.summarize_backward`."""
    grad, grad_sums = grad.contiguous(), grad_sums.contiguous()
    grad_k, grad_v = new_gradient(k), new_gradient(v)
    # Gradients that float16 does not hold become infinite, as scalers of gradients expect.
    _launch("inner", (k, grad_v), grad, grad_sums, layout, features, SATURATE=False)
    _launch("rows", (k, v, grad_k), grad, grad_sums, layout, features, centre=centre)
    return grad_k, grad_v


def read(
    q: Tensor,
    summaries: Tensor,
    sums: Tensor,
    centre: Tensor,
    mixing: Tensor,
    layout: BlockLayout,
    features: Features,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See :func:`mhla_diffusion.ops.tiled.read`."""
    out, denominators = new_outputs(q, summaries, sums, features, dtype)
    mixed, mixed_sums = _mix(_filled_up(mixing, summaries, features), summaries, sums)
    quotient = _Quotient(denominators) if features.normalized else None
    _launch(
        "inner", (q, out), mixed, mixed_sums, layout, features, centre=centre, quotient=quotient,
        SATURATE=dtype == torch.float16 and not features.normalized,
    )  # fmt: skip
    return out, denominators


def read_backward(
    grad: Tensor,
    out: Tensor,
    denominators: Tensor,
    q: Tensor,
    summaries: Tensor,
    sums: Tensor,
    mixing: Tensor,
    layout: BlockLayout,
    features: Features,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`mhla_diffusion.ops.tiled.read_backward`; ``out`` is not read."""
    weights = _filled_up(mixing, summaries, features)
    mixed, mixed_sums = _mix(weights, summaries, sums)
    grad_q, grad_mixed, grad_sums = new_gradient(q), torch.empty_like(mixed), torch.empty_like(mixed_sums)
    quotient = _Quotient(denominators, torch.empty_like(denominators)) if features.normalized else None
    _launch("rows", (q, grad, grad_q), mixed, mixed_sums, layout, features, quotient=quotient)
    _outer(q, grad, grad_mixed, grad_sums, layout, features, quotient=quotient)
    grad_weights = grad_mixed.flatten(3) @ summaries.flatten(3).mT  # [B, H, M_q, M_k]
    grad_mixing = grad_weights.to(mixing.dtype).sum_to_size(weights.shape)
    if sums.shape[-1]:
        grad_mixing = grad_mixing + (grad_sums @ sums.mT).sum_to_size(weights.shape)
    rows, columns = mixing.shape[-2:]
    # A copy, as outputs of an operator have their own memory.
    return grad_q, *_mix(weights.mT, grad_mixed, grad_sums), grad_mixing[..., :rows, :columns].clone()


def new_summaries(
    k: Tensor, v: Tensor, layout: BlockLayout, features: Features
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors as in :class:`mhla_diffusion.ops.operators.Summaries`.

    Bfloat16 keys and values have bfloat16 summaries with the sums apart.
    """
    shape, d, channels = (*k.shape[:2], _blocks(layout, features)), k.shape[-1], v.shape[-1]
    narrow = k.dtype == v.dtype == torch.bfloat16 and not features.shared
    apart = narrow and features.normalized
    centred = features.normalized and features.rotary is None and not features.shared
    dtype = torch.bfloat16 if narrow else torch.float32
    return (
        k.new_empty(*shape, channels + int(features.normalized and not apart), d, dtype=dtype),
        k.new_empty(*shape, d if apart else 0, dtype=torch.float32),
        k.new_empty(*k.shape[:2], channels if centred else 0, dtype=torch.float32),
    )


def _blocks(layout: BlockLayout, features: Features) -> int:
    """Number of summaries: that of the blocks, many filled up to a multiple of 8."""
    few = features.shared or layout.num_blocks <= _FEW_BLOCKS
    return layout.num_blocks if few else -(-layout.num_blocks // 8) * 8


def _filled_up(mixing: Tensor, summaries: Tensor, features: Features) -> Tensor:
    """Weights that are zero for blocks, and of blocks, which are only there to fill up."""
    rows, columns = mixing.shape[-2:]
    more = -(-rows // 8) * 8 - rows if rows > _FEW_BLOCKS and not features.shared else 0
    empty = summaries.shape[2] - columns
    return torch.nn.functional.pad(mixing, (0, empty, 0, more)) if more or empty else mixing


def _centre(v: Tensor, mask: Tensor | None, *, out: Tensor) -> None:
    """About the mean of the values that count, ``[B, H, d_v]``. Any other centre would be right, too."""
    batch, heads, tokens, channels = v.shape
    step = max(1, tokens // _SAMPLE) | 1  # odd, so that it meets every column of a grid of even width
    tiles = -(-channels // _CENTRE_TILE["DV"])
    if batch * heads:
        kernels.centre_kernel[(batch * heads * tiles,)](
            v, out, mask, *v.stride(), *((0, 0) if mask is None else mask.stride()), heads, tokens, step,
            MASK=mask is not None, CHANNELS=channels, TILES=tiles, **_CENTRE_TILE,
        )  # fmt: skip


def _mix(weights: Tensor, summaries: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Summaries and sums of the query blocks, contiguous."""
    mixed = mix(weights.to(summaries.dtype), summaries).contiguous()
    if not sums.shape[-1]:
        return mixed, sums.new_empty(*mixed.shape[:3], 0)
    return mixed, (weights @ sums).contiguous()


class _Quotient(NamedTuple):
    """What ``o = n / den`` needs: den and, in the backward, the gradient of den, ``[B, H, N]``.

    ``rows`` stores the latter, for ``outer`` to read.
    """

    den: Tensor
    den_grad: Tensor | None = None


def _outer(
    x: Tensor,
    v: Tensor,
    summaries: Tensor,
    sums: Tensor,
    layout: BlockLayout,
    features: Features,
    **options: Any,
) -> None:
    """Summaries, by several programs a block where there are few blocks; what each finds is then added up."""
    parts = _parts("outer", x.shape[0] * x.shape[1], layout)
    if parts == 1:
        _launch("outer", (x, v), summaries, sums, layout, features, **options)
        return
    each, each_sums = (
        y.new_empty(*y.shape[:3], parts, *y.shape[3:], dtype=torch.float32) for y in (summaries, sums)
    )
    _launch("outer", (x, v), each, each_sums, layout, features, dtype=summaries.dtype, **options)
    summaries.copy_(each.sum(3))
    sums.copy_(each_sums.sum(3))


def _launch(
    name: str,
    tokens: tuple[Tensor, ...],
    summaries: Tensor,
    sums: Tensor,
    layout: BlockLayout,
    features: Features,
    *,
    centre: Tensor | None = None,
    quotient: _Quotient | None = None,
    dtype: torch.dtype | None = None,
    **options: bool,
) -> None:
    """Run a kernel on x, v and what else it takes of tokens; ``out`` and gradients are written in place.

    ``dtype`` is that of the summaries in the end, where these are parts of them.
    """
    x, v = (y if y.stride(-1) == 1 else y.contiguous() for y in tokens[:2])
    assert v is tokens[1] or name != "inner", "outputs have their channels side by side"
    tokens = (x, v, *tokens[2:])
    rotary, mask = features.rotary, features.mask
    if rotary is not None:
        rotary = rotary.float().expand(*x.shape[:-1], -1)
        rotary = rotary if rotary.stride(-1) == 1 else rotary.contiguous()
    if centre is not None and not centre.shape[-1]:
        centre = None
    plan = _plan(
        name, layout, features.feature_map, features.eps, features.normalized, centre is not None,
        quotient is not None, dtype or summaries.dtype, summaries.shape, sums.shape[-1],
        *((y.shape, y.stride(), y.dtype) for y in tokens),
        rotary=None if rotary is None else rotary.stride(), mask=None if mask is None else mask.stride(),
        tf32=torch.backends.cuda.matmul.fp32_precision == "tf32",
    )  # fmt: skip
    if plan.programs:
        getattr(kernels, f"{name}_kernel")[(plan.programs,)](
            *tokens, summaries, sums if sums.shape[-1] else summaries[..., -1, :], centre,
            *(quotient or (None, None)), *_order(layout, x.device, plan.blocks), rotary, mask,
            *plan.numbers, **plan.options, **options,
        )  # fmt: skip


class _Plan(NamedTuple):
    """How a kernel is launched: number of programs and blocks, arguments that are numbers, and constants."""

    programs: int
    blocks: int
    numbers: tuple[float, ...]
    options: dict[str, Any]


class _Meta(NamedTuple):
    """What a plan knows of a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@functools.lru_cache(maxsize=1024)
def _plan(
    name: str,
    layout: BlockLayout,
    feature_map: str,
    eps: float,
    normalized: bool,
    centred: bool,
    quotient: bool,
    dtype: torch.dtype,
    summaries: torch.Size,
    sums: int,
    *tensors: tuple[Any, ...],
    rotary: tuple[int, ...] | None,
    mask: tuple[int, ...] | None,
    tf32: bool,
) -> _Plan:
    """All that does not depend on what tensors hold; a model asks the same again and again."""
    tokens = [_Meta(*y) for y in tensors]
    (x, v, *_), rest = tokens, tokens[2:]
    batch, heads, length, width = x.shape
    tile = _tile(name, width, v.shape[-1], x.dtype, v.dtype, dtype, tf32)
    parts = _parts(name, batch * heads, layout)
    size = math.prod(summaries[-2:])
    programs = batch * heads * summaries[2] * parts * (1 if name == "rows" else tile["TILES"])
    numbers = (
        *(stride for y in tokens for stride in y.stride[:3]), *((0, 0, 0) if rotary is None else rotary[:3]),
        *((0, 0) if mask is None else mask), size, sums or size, heads, summaries[2], parts, length, eps,
    )  # fmt: skip
    options = {
        "QUOTIENT": quotient, "NORMALIZED": normalized, "CENTRED": centred, "FEATURE_MAP": feature_map,
        "ROTARY": rotary is not None, "MASK": mask is not None, "WIDTH": width, "CHANNELS": v.shape[-1],
        "X_VEC": _vector(x, *rest), "V_VEC": _vector(v), **tile,
    }  # fmt: skip
    return _Plan(programs, summaries[2], numbers, options)


def _vector(*tensors: _Meta) -> int:
    """The largest power of two, up to 8, that all rows of the tensors start at multiples of."""
    return math.gcd(8, *(stride for x in tensors for stride in x.stride[:3]))


def _parts(name: str, rows: int, layout: BlockLayout) -> int:
    """How many programs share a block, for so many samples times heads."""
    most = layout.block_size // _FEWEST
    return max(1, min(most, -(-_PROGRAMS[name] // max(1, rows * layout.num_blocks))))


# Tokens at a time, warps and stages of bfloat16 kernels, by whether rows are wider than 64: the fastest on an
# H200 of 16 to 128 tokens, 4 and 8 warps and 1 to 3 stages, at the shapes of scripts/gpu_validate.py. What
# counts is how many programs fit a multiprocessor, as most of the time is spent waiting for memory.
_NARROW = {
    ("outer", False): (32, 4, 1), ("inner", False): (64, 4, 2), ("rows", False): (32, 4, 3),
    ("outer", True): (32, 4, 1), ("inner", True): (64, 8, 1), ("rows", True): (16, 4, 3),
}  # fmt: skip
# Registers of a thread of 8 warps, so that two programs fit.
_REGISTERS = 128


def _tile(
    name: str, width: int, height: int, x: torch.dtype, v: torch.dtype, summaries: torch.dtype, tf32: bool
) -> dict[str, Any]:
    """Compile-time options: what is multiplied, and how much of it at a time.

    The sizes keep accumulators in registers and shared memory within the 99 KB of the smallest GPUs (compute
    capabilities 8.6, 8.9 and 12.0): scripts/check_kernels.py compiles all of them.
    """
    d, channels = (max(16, triton.next_power_of_2(size)) for size in (width, height))
    factors = (x,) if name == "inner" else (x, v)
    narrow = summaries == torch.bfloat16 or all(dtype == torch.bfloat16 for dtype in factors)
    most = (128 if d <= 128 else 64) if narrow else (64 if d <= 64 else 32)
    channels = min(channels, most)
    wide = max(d, channels) > 64
    precision = "ieee" if narrow else _precision(factors, tf32)
    if narrow and d <= 128:
        rows, warps, stages = _NARROW[name, wide]
    elif narrow:
        rows, warps, stages = 32, 8, 2
    else:
        rows = 32 if d <= 64 or (d <= 128 and name != "outer") else 16
        # Four warps of "rows" would spill most of what exact products of float32 hold.
        warps, stages = 8 if wide or (name == "rows" and precision == "ieee") else 4, 2
    limited = narrow and d <= 128 and warps == 8 and torch.version.hip is None
    registers = {"maxnreg": _REGISTERS} if limited else {}
    return {
        "OPERAND": tl.bfloat16 if narrow else tl.float32,
        "PRECISION": precision,
        "ROWS": rows, "D": d, "DV": channels, "TILES": -(-height // channels),
        "num_warps": warps, "num_stages": stages, **registers,
    }  # fmt: skip


def _precision(factors: tuple[torch.dtype, ...], tf32: bool) -> str:
    """How float32 numbers are multiplied that stand for such tensors."""
    if torch.version.hip is not None:
        return "ieee"  # few of its devices have TF32
    return "tf32" if tf32 or torch.float32 not in factors else "ieee"


@functools.lru_cache(maxsize=64)
def _order(layout: BlockLayout, device: torch.device, blocks: int) -> tuple[Tensor, Tensor]:
    """Tokens sorted by block, ``[N]``, and where each block starts among them, ``[blocks + 1]``; int32.

    Blocks beyond those of the layout are empty.
    """
    index = layout.block_index(device)
    starts = torch.searchsorted(index.sort().values, torch.arange(blocks + 1, device=device))
    return index.argsort(stable=True).int(), starts.int()
