"""GPU kernels for :mod:`mhla_diffusion.ops.tiled`: the same four functions, blocks gathered in registers.

Three kernels do everything (:mod:`mhla_diffusion.ops.triton_kernels`):

- ``outer``, summaries of values and features: the forward of ``summarize``, and the gradient of the mixed
  summaries in ``read``;
- ``inner``, products of features and summaries: the forward of ``read``, and the gradient of v;
- ``rows``, the gradient of q or k, through rotation and feature map.

Mixing is a product of matrices and torch's. All sums are float32. What is multiplied is

- bfloat16 where q, k and v are: features and summaries are rounded to it, and summaries stored in it, with
  the sums of features apart, in float32;
- TF32 for float16, which it holds; features after rotation and summaries lose what it does not hold;
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
# Tokens whose mean stands for that of all values.
_SAMPLE = 256


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
    mixed, mixed_sums = _mix(mixing, summaries, sums)
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
    mixed, mixed_sums = _mix(mixing, summaries, sums)
    grad_q, grad_mixed, grad_sums = new_gradient(q), torch.empty_like(mixed), torch.empty_like(mixed_sums)
    quotient = _Quotient(denominators, torch.empty_like(denominators)) if features.normalized else None
    _launch("rows", (q, grad, grad_q), mixed, mixed_sums, layout, features, quotient=quotient)
    _outer(q, grad, grad_mixed, grad_sums, layout, features, quotient=quotient)
    grad_weights = grad_mixed.flatten(3) @ summaries.flatten(3).mT  # [B, H, M_q, M_k]
    axes = (0,) if mixing.ndim == 3 else (0, 1)
    grad_mixing = grad_weights.sum(axes, dtype=mixing.dtype)
    if sums.shape[-1]:
        grad_mixing += (grad_sums @ sums.mT).sum(axes)
    return grad_q, *_mix(mixing.mT, grad_mixed, grad_sums), grad_mixing


def new_summaries(
    k: Tensor, v: Tensor, layout: BlockLayout, features: Features
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors as in :class:`mhla_diffusion.ops.operators.Summaries`.

    Bfloat16 keys and values have bfloat16 summaries with the sums apart.
    """
    shape, d, channels = (*k.shape[:2], layout.num_blocks), k.shape[-1], v.shape[-1]
    narrow = k.dtype == v.dtype == torch.bfloat16 and not features.shared
    apart = narrow and features.normalized
    centred = features.normalized and features.rotary is None and not features.shared
    dtype = torch.bfloat16 if narrow else torch.float32
    return (
        k.new_empty(*shape, channels + (features.normalized and not apart), d, dtype=dtype),
        k.new_empty(*shape, d if apart else 0, dtype=torch.float32),
        k.new_empty(*k.shape[:2], channels if centred else 0, dtype=torch.float32),
    )


def _centre(v: Tensor, mask: Tensor | None, *, out: Tensor) -> None:
    """About the mean of the values that count, ``[B, H, d_v]``. Any other centre would be right, too."""
    batch, heads, tokens, channels = v.shape
    step = max(1, tokens // _SAMPLE) | 1  # odd, so that it meets every column of a grid of even width
    if batch * heads:
        kernels.centre_kernel[(batch * heads,)](
            v, out, mask, *v.stride(), *((0, 0) if mask is None else mask.stride()), heads, tokens, step,
            MASK=mask is not None, CHANNELS=channels, ROWS=32, DV=triton.next_power_of_2(channels),
            num_warps=4,
        )  # fmt: skip


def _mix(mixing: Tensor, summaries: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Summaries and sums of the query blocks, contiguous."""
    mixed = mix(mixing.to(summaries.dtype), summaries).contiguous()
    if not sums.shape[-1]:
        return mixed, sums.new_empty(*mixed.shape[:3], 0)
    return mixed, mix(mixing, sums[..., None, :]).flatten(3).contiguous()


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
    tile, parts = _tile("outer", x, v, summaries), _parts("outer", x, layout)
    if parts == 1:
        _launch("outer", (x, v), summaries, sums, layout, features, tile=tile, **options)
        return
    each, each_sums = (
        y.new_empty(*y.shape[:3], parts, *y.shape[3:], dtype=torch.float32) for y in (summaries, sums)
    )
    _launch("outer", (x, v), each, each_sums, layout, features, tile=tile, **options)
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
    tile: dict[str, Any] | None = None,
    **options: bool,
) -> None:
    """Run a kernel on x, v and what else it takes of tokens; ``out`` and gradients are written in place."""
    x, v = (y if y.stride(-1) == 1 else y.contiguous() for y in tokens[:2])
    assert v is tokens[1] or name != "inner", "outputs have their channels side by side"
    tokens = (x, v, *tokens[2:])
    tile, parts = tile or _tile(name, x, v, summaries), _parts(name, x, layout)
    rotary, mask = features.rotary, features.mask
    if rotary is not None:
        rotary = rotary.float().expand(*x.shape[:-1], -1)
        rotary = rotary if rotary.stride(-1) == 1 else rotary.contiguous()
    z = sums if sums.shape[-1] else summaries[..., -1, :]
    size = math.prod(summaries.shape[-2:])
    order, starts = _order(layout, x.device)
    centred = centre is not None and centre.shape[-1] > 0
    arguments = (
        *tokens, summaries, z, centre if centred else None, *(quotient or (None, None)), order, starts,
        rotary, mask, *(stride for y in tokens for stride in y.stride()[:3]),
        *((0, 0, 0) if rotary is None else rotary.stride()[:3]), *((0, 0) if mask is None else mask.stride()),
        size, z.shape[-1] if sums.shape[-1] else size, x.shape[1], layout.num_blocks, parts, x.shape[2],
        features.eps,
    )  # fmt: skip
    programs = x.shape[0] * x.shape[1] * layout.num_blocks * parts * (1 if name == "rows" else tile["TILES"])
    if programs:
        getattr(kernels, f"{name}_kernel")[(programs,)](
            *arguments, QUOTIENT=quotient is not None, NORMALIZED=features.normalized, CENTRED=centred,
            FEATURE_MAP=features.feature_map, ROTARY=rotary is not None, MASK=mask is not None,
            WIDTH=x.shape[-1], CHANNELS=v.shape[-1], X_VEC=_vector(x, *tokens[2:]), V_VEC=_vector(v),
            **tile, **options,
        )  # fmt: skip


def _vector(*tensors: Tensor) -> int:
    """The largest power of two, up to 8, that all rows of the tensors start at multiples of."""
    return math.gcd(8, *(stride for x in tensors for stride in x.stride()[:3]))


def _parts(name: str, x: Tensor, layout: BlockLayout) -> int:
    """How many programs share a block."""
    programs = x.shape[0] * x.shape[1] * layout.num_blocks
    most = layout.block_size // _FEWEST
    return max(1, min(most, -(-_PROGRAMS[name] // max(1, programs))))


def _tile(name: str, x: Tensor, v: Tensor, summaries: Tensor) -> dict[str, Any]:
    """Compile-time options: what is multiplied, and how much of it at a time.

    The sizes keep accumulators in registers and shared memory within the 99 KB of the smallest GPUs (compute
    capabilities 8.6, 8.9 and 12.0): scripts/check_kernels.py compiles all of them.
    """
    d, channels = (max(16, triton.next_power_of_2(y.shape[-1])) for y in (x, v))
    factors = (x,) if name == "inner" else (x, v)
    narrow = summaries.dtype == torch.bfloat16 or all(y.dtype == torch.bfloat16 for y in factors)
    if narrow:
        rows, most = (64, 128) if d <= 128 else (32, 64)
    else:
        rows, most = (32, 64) if d <= 64 else (16 if d > 128 or name == "outer" else 32, 32)
    channels = min(channels, most)
    wide = max(d, channels) > 64
    return {
        "OPERAND": tl.bfloat16 if narrow else tl.float32,
        "PRECISION": "ieee" if narrow else _precision(factors),
        "ROWS": rows, "D": d, "DV": channels, "TILES": -(-v.shape[-1] // channels),
        "num_warps": 8 if wide else 4, "num_stages": 2,
    }  # fmt: skip


def _precision(factors: tuple[Tensor, ...]) -> str:
    """How float32 numbers are multiplied that stand for these tensors."""
    if torch.version.hip is not None:
        return "ieee"  # few of its devices have TF32
    if all(x.dtype != torch.float32 for x in factors):
        return "tf32"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@functools.lru_cache(maxsize=64)
def _order(layout: BlockLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens sorted by block, ``[N]``, and where each block starts among them, ``[M + 1]``; int32."""
    blocks = layout.block_index(device)
    starts = torch.searchsorted(blocks.sort().values, torch.arange(layout.num_blocks + 1, device=device))
    return blocks.argsort(stable=True).int(), starts.int()
