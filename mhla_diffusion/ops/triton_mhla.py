"""GPU kernels for :mod:`mhla_diffusion.ops.tiled`: the same four functions, blocks gathered in registers.

Four kernels do everything (:mod:`mhla_diffusion.ops.triton_kernels`):

- ``outer``, summaries of values and features: the forward of ``summarize``;
- ``inner``, products of features and summaries: the forward of ``read``;
- ``queries``, the gradient of q and, of heads up to 64 wide, that of the mixed summaries. A wider one would
  not leave registers for a second program on a multiprocessor: ``outer`` finds it then;
- ``keys``, the gradients of k and v.

Mixing is a product of matrices and torch's, which is several times slower where sizes are no multiples of 8:
many blocks are filled up with empty ones. All sums are float32. What is multiplied is

- bfloat16 where q, k and v are: features and summaries are rounded to it, and summaries stored in it, with
  the sums of features apart, in float32. Without rotation the sums are products, too, by ones, and the
  denominators by the sums, each in three numbers of bfloat16;
- TF32 for float16, which it holds; features after rotation and summaries are rounded to it;
- float32 for float32, or TF32 where ``torch.backends.cuda.matmul.fp32_precision`` is "tf32".

Denominators are float32 throughout. Values that have a mean would make that rounding costly: gradients of q
and W are small differences. So values are centred where the output then only moves by as much, ``o(v - m) +
m = o(v)``: where there is a denominator and no rotation. Values of one give exactly one.

Head widths that are no power of two are padded to the next in registers (72, 80 and 88 without rotation to
64 and 16 or 32), and no more bytes are moved. No atomics: results do not change from run to run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
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
_PROGRAMS = {"outer": 264, "inner": 1024, "queries": 1024, "keys": 1024}
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
    _launch("keys", (k, v, grad_k, grad_v), grad, grad_sums, layout, features, centre=centre)
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
    _launch(
        "inner", (q, out), mixed, mixed_sums, layout, features, centre=centre,
        den=denominators if features.normalized else None,
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
    den = denominators if features.normalized else None
    _queries_backward((q, grad, grad_q), (mixed, mixed_sums), (grad_mixed, grad_sums), den, layout, features)
    grad_weights = grad_mixed.flatten(3) @ summaries.flatten(3).mT  # [B, H, M_q, M_k]
    grad_mixing = grad_weights.to(mixing.dtype).sum_to_size(weights.shape)
    if sums.shape[-1]:
        grad_mixing = grad_mixing + (grad_sums @ sums.mT).sum_to_size(weights.shape)
    rows, columns = mixing.shape[-2:]
    # A copy, as outputs of an operator have their own memory.
    return grad_q, *_mix(weights.mT, grad_mixed, grad_sums), grad_mixing[..., :rows, :columns].clone()


def _queries_backward(
    tokens: tuple[Tensor, Tensor, Tensor],
    mixed: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    den: Tensor | None,
    layout: BlockLayout,
    features: Features,
) -> None:
    """Gradients of queries and of their summaries: by one kernel, or by two where one would hold too much."""
    q, grad, _ = tokens
    options = _tile("queries", q, grad, mixed[0].dtype, _target(q.device))
    if options["FUSED"]:
        _add_up(
            *grads, _parts("outer", q, layout),
            lambda matrices, sums: _launch(
                "queries", tokens, *mixed, layout, features, den=den, parts=_parts("outer", q, layout),
                matrix_grads=matrices, sum_grads=_row_of_sums(matrices, sums), den_grad=None,
            ),
        )  # fmt: skip
        return
    den_grad = None if den is None else torch.empty_like(den)
    _launch(
        "queries", tokens, *mixed, layout, features, den=den, den_grad=den_grad,
        matrix_grads=None, sum_grads=None,
    )  # fmt: skip
    _outer(q, grad, *grads, layout, features, den=den, den_grad=den_grad)


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


def _row_of_sums(summaries: Tensor, sums: Tensor) -> Tensor:
    """Sums where they are: apart, or the last row of the summaries."""
    return sums if sums.shape[-1] else summaries[..., -1, :]


def _outer(
    x: Tensor,
    v: Tensor,
    summaries: Tensor,
    sums: Tensor,
    layout: BlockLayout,
    features: Features,
    **given: Any,
) -> None:
    """Summaries of x and v."""
    parts = _parts("outer", x, layout)
    _add_up(
        summaries, sums, parts,
        lambda each, each_sums: _launch(
            "outer", (x, v), each, each_sums, layout, features, dtype=summaries.dtype, parts=parts, **given
        ),
    )  # fmt: skip


def _add_up(summaries: Tensor, sums: Tensor, parts: int, launch: Callable[[Tensor, Tensor], None]) -> None:
    """Launch what writes summaries, by several programs a block, and add up what each of them finds."""
    if parts == 1:
        launch(summaries, sums)
        return
    each, each_sums = (
        y.new_empty(*y.shape[:3], parts, *y.shape[3:], dtype=torch.float32) for y in (summaries, sums)
    )
    launch(each, each_sums)
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
    dtype: torch.dtype | None = None,
    parts: int | None = None,
    **given: Any,
) -> None:
    """Run a kernel on x, v and, in the backward, what is written of their gradients.

    ``dtype`` is that of the summaries in the end, where these are parts of them; ``parts`` how many programs
    share a block; ``given`` what only this kernel takes.
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
        given.get("den_grad") is not None, dtype or summaries.dtype, summaries.shape, sums.shape[-1],
        parts or _parts(name, x, layout), *((y.shape, y.stride(), y.dtype) for y in tokens),
        rotary=None if rotary is None else rotary.stride(), mask=None if mask is None else mask.stride(),
        target=_target(x.device),
    )  # fmt: skip
    kernel = getattr(kernels, f"{name}_kernel")
    assert mask is None or "mask" in kernel.arg_names, "masks are of keys"
    if plan.programs:
        order, starts = _order(layout, x.device, plan.blocks)
        tensors = dict(zip(_TOKENS, tokens, strict=False)) | {
            "summaries": summaries, "sums": _row_of_sums(summaries, sums), "order": order, "starts": starts,
            "centre": centre, "rotary": rotary, "mask": mask, "den": None, "den_grad": None, **given,
        }  # fmt: skip
        kernel[(plan.programs,)](**_taken(kernel, tensors), **plan.arguments)


# Names of what kernels take of tokens.
_TOKENS = ("x", "v", "dx", "dv")


def _taken(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a kernel has."""
    return {name: value for name, value in arguments.items() if name in kernel.arg_names}


class _Plan(NamedTuple):
    """How a kernel is launched: number of programs and blocks, arguments that are numbers, and options."""

    programs: int
    blocks: int
    arguments: dict[str, Any]


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
    parts: int,
    *tensors: tuple[Any, ...],
    rotary: tuple[int, ...] | None,
    mask: tuple[int, ...] | None,
    target: _Target,
) -> _Plan:
    """All that does not depend on what tensors hold; a model asks the same again and again."""
    tokens = [_Meta(*y) for y in tensors]
    x, v = tokens[:2]
    batch, heads, length, width = x.shape
    parted = rotary is None and feature_map != "softmax"
    tile = _tile(name, x, v, dtype, target, parted=parted, beside=normalized and rotary is None)
    size = math.prod(summaries[-2:])
    numbers: dict[str, float] = {
        f"{name}_{axis}": stride
        for name, y in zip(_TOKENS, tokens, strict=False)
        for axis, stride in zip("bhn", y.stride, strict=False)
    }
    numbers |= dict(zip(("r_b", "r_h", "r_n"), rotary or (0, 0, 0), strict=False))
    numbers |= dict(zip(("mask_b", "mask_n"), mask or (0, 0), strict=False))
    numbers |= {
        "summary_stride": size, "sums_stride": sums or size, "heads": heads, "blocks": summaries[2],
        "parts": parts, "tokens": length, "eps": eps,
    }  # fmt: skip
    constants = {
        "QUOTIENT": quotient, "NORMALIZED": normalized, "CENTRED": centred, "FEATURE_MAP": feature_map,
        "ROTARY": rotary is not None, "MASK": mask is not None, "WIDTH": width, "CHANNELS": v.shape[-1],
        "X_VEC": _vector(x, *tokens[2:3]), "V_VEC": _vector(v, *tokens[3:]),
        # Rows that threads of 4 warps cover with 16 bytes each.
        "KEPT": min(tile["ROWS"], max(8, 1024 // tile["D"])),
    }  # fmt: skip
    if tile["OPERAND"] == tl.bfloat16 and tile["D"] <= 128 and tile["num_warps"] == 8 and target.major:
        # More than that is needed for other features and for masks, and would be spilled.
        tile |= {"maxnreg": _REGISTERS} if feature_map == "relu" and mask is None else {}
    steps = [y.stride[2] for y in tokens] + [rotary[2] if rotary else 0, mask[1] if mask else 0]
    constants["PLACE"] = tl.int32 if length * max(steps) < 2**31 else tl.int64
    kernel = getattr(kernels, f"{name}_kernel")
    split = tile["TILES"] if name in ("outer", "inner") else 1
    programs = batch * heads * summaries[2] * parts * split
    return _Plan(programs, summaries[2], {**_taken(kernel, {**numbers, **constants}), **tile})


def _vector(*tensors: _Meta) -> int:
    """The largest power of two, up to 8, that all rows of the tensors start at multiples of."""
    return math.gcd(8, *(stride for x in tensors for stride in x.stride[:3]))


def _parts(name: str, x: Tensor, layout: BlockLayout) -> int:
    """How many programs share a block, for so many samples times heads."""
    most, rows = layout.block_size // _FEWEST, x.shape[0] * x.shape[1]
    return max(1, min(most, -(-_PROGRAMS[name] // max(1, rows * layout.num_blocks))))


class _Target(NamedTuple):
    """The GPU: major number of its compute capability, 0 for AMD's; and whether float32 may be TF32."""

    major: int
    tf32: bool


def _target(device: torch.device) -> _Target:
    """For what is not a GPU, an H100's."""
    return _Target(_major(device), torch.backends.cuda.matmul.fp32_precision == "tf32")


@functools.cache
def _major(device: torch.device) -> int:
    if torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


# Tokens at a time, warps and stages, for heads up to 64, 128 and 256 wide. Those of bfloat16 up to 128 were
# the fastest on an H200 of 16 to 128 tokens, 4 and 8 warps and 1 to 3 stages, at the shapes of
# scripts/gpu_validate.py; "keys", and "queries" up to 64, were never timed. What counts is how many programs
# fit a multiprocessor, as most of the time is spent waiting for memory.
_TILES = {
    ("outer", "bf16"): ((32, 4, 1), (32, 4, 1), (32, 8, 2)),
    ("inner", "bf16"): ((64, 4, 2), (64, 8, 1), (32, 8, 2)),
    ("queries", "bf16"): ((32, 4, 1), (16, 4, 3), (32, 8, 2)),
    ("keys", "bf16"): ((64, 4, 2), (64, 8, 1), (32, 8, 1)),
    ("outer", "tf32"): ((32, 4, 2), (16, 8, 2), (16, 8, 2)),
    ("inner", "tf32"): ((32, 4, 2), (32, 8, 2), (16, 8, 2)),
    ("queries", "tf32"): ((32, 4, 2), (32, 8, 2), (16, 8, 2)),
    ("keys", "tf32"): ((32, 4, 2), (32, 8, 2), (32, 8, 1)),
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
    (8, "keys", "bf16", 128): (32, 8, 1),
    (10, "outer", "bf16", 64): (32, 8, 1), (10, "outer", "bf16", 80): (32, 8, 1),
    (10, "inner", "bf16", 128): (64, 8, 2), (10, "keys", "bf16", 128): (32, 8, 1),
    (12, "outer", "bf16", 128): (16, 4, 1), (12, "inner", "bf16", 128): (32, 4, 1),
    (12, "queries", "tf32", 64): (32, 8, 2),
    (0, "inner", "bf16", 256): (16, 8, 1), (0, "keys", "bf16", 256): (16, 8, 1),
    (0, "queries", "ieee", 64): (16, 8, 1), (0, "queries", "ieee", 128): (16, 8, 1),
    (0, "keys", "ieee", 256): (16, 4, 1),
}  # fmt: skip
# The largest summary that a program holds beside all else of the queries and leaves room for others.
_MOST_HELD = 64 * 64
# Registers of a thread of 8 warps, so that two programs fit.
_REGISTERS = 128


def _tile(
    name: str,
    x: Tensor | _Meta,
    v: Tensor | _Meta,
    summaries: torch.dtype,
    target: _Target,
    *,
    parted: bool = False,
    beside: bool = False,
) -> dict[str, Any]:
    """Compile-time options: what is multiplied, and how much of it at a time.

    The sizes keep accumulators in registers and shared memory within the 99 KB of the smallest GPUs (compute
    capabilities 8.6, 8.9 and 12.0): scripts/check_kernels.py compiles all of them. parted: whether a row may
    be held in two tiles. beside: whether products may find the sums.
    """
    d, channels = (max(16, triton.next_power_of_2(y.shape[-1])) for y in (x, v))
    factors = (x.dtype,) if name == "inner" else (x.dtype, v.dtype)
    narrow = summaries == torch.bfloat16 or all(dtype == torch.bfloat16 for dtype in factors)
    channels = min(channels, (128 if d <= 128 else 64) if narrow else (64 if d <= 64 else 32))
    tiles = -(-v.shape[-1] // channels)
    precision = "ieee" if narrow else _precision(factors, target)
    tail, tail_v = _tails(x.shape[-1], v.shape[-1], parted, beside) if narrow and d <= 128 else (0, 0)
    if tail:
        d, channels, tiles = 64, 64, 1
    kind, size = "bf16" if narrow else precision, d + tail if tail else max(64, d, channels)
    tile = _PARTED_TILES[name] if tail else _TILES[name, kind][(64, 128, 256).index(size)]
    rows, warps, stages = _OTHER_TILES.get((target.major, name, kind, size), tile)
    options = {
        "OPERAND": tl.bfloat16 if narrow else tl.float32, "PRECISION": precision, "TAIL": tail,
        "ROWS": rows, "D": d, "DV": channels, "TILES": tiles, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
    if name in ("outer", "inner"):
        options |= {"TAIL_V": tail_v, "FREE": max(v.shape[-1], channels * tiles)}
    if name == "queries":
        exact = not narrow and precision == "ieee"
        options["FUSED"] = d * channels <= _MOST_HELD and tiles == 1 and not tail and not exact
    return options


def _tails(width: int, channels: int, parted: bool, beside: bool) -> tuple[int, int]:
    """Channels of x and of v in a second tile; three more of v are for sums beside them."""
    more, sums = width - 64, 3 * beside
    if parted and width == channels and width % 8 == 0 and 0 < more <= 32 - sums:
        return max(16, triton.next_power_of_2(more)), max(16, triton.next_power_of_2(more + sums))
    return 0, 16 * beside


def _precision(factors: tuple[torch.dtype, ...], target: _Target) -> str:
    """How float32 numbers are multiplied that stand for such tensors; few of AMD's devices have TF32."""
    return "tf32" if target.major and (target.tf32 or torch.float32 not in factors) else "ieee"


@functools.lru_cache(maxsize=64)
def _order(layout: BlockLayout, device: torch.device, blocks: int) -> tuple[Tensor, Tensor]:
    """Tokens by block, ``[N]``, and where each block starts among them, or would, ``[blocks + 1]``; int32."""
    index = layout.block_index(device)
    starts = torch.searchsorted(index.sort().values, torch.arange(blocks + 1, device=device))
    return index.argsort(stable=True).int(), starts.int()
