"""GPU kernels for :mod:`mhla_diffusion.ops.tiled`: the same four functions, blocks gathered in registers.

Three kernels do everything, each on one block of one head at a time:

- :func:`_outer_kernel`, summaries of values and features: the forward of ``summarize``, and the gradient of
  the mixed summaries in ``read``;
- :func:`_inner_kernel`, products of features and summaries: the forward of ``read``, and the gradient of v;
- :func:`_rows_kernel`, the gradient of q or k, through rotation and feature map.

Mixing is a product of matrices and torch's. Sums are float32; products of float32 inputs are so too, unless
``torch.backends.cuda.matmul.allow_tf32`` is set, and those of narrower inputs TF32, which holds them exactly.
Head widths that are no power of two are padded to the next: d = 72 does the work of 128, but moves no more
bytes. No atomics: results do not change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .composite import mix
from .features import FEATURE_MAPS, Features
from .layout import BlockLayout
from .tiled import new_outputs, new_summaries

_ROWS = 32  # tokens at a time


def summarize(k: Tensor, v: Tensor, layout: BlockLayout, features: Features) -> Tensor:
    """See :func:`mhla_diffusion.ops.tiled.summarize`."""
    summaries = new_summaries(k, v, layout, features)
    _outer(k, v, summaries, layout, features)
    return summaries


def summarize_backward(
    grad: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, features: Features
) -> tuple[Tensor, Tensor]:
    """See :func:`mhla_diffusion.ops.tiled.summarize_backward`."""
    grad = grad.contiguous()
    grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
    _inner(k, grad, grad_v, None, layout, features)
    _rows(k, v, grad, grad_k, layout, features)
    return grad_k, grad_v


def read(
    q: Tensor, summaries: Tensor, mixing: Tensor, layout: BlockLayout, features: Features, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See :func:`mhla_diffusion.ops.tiled.read`."""
    out, denominators = new_outputs(q, summaries, features, dtype)
    mixed = mix(mixing, summaries).contiguous()
    _inner(q, mixed, out, denominators if features.normalized else None, layout, features)
    return out, denominators


def read_backward(
    grad: Tensor,
    out: Tensor,
    denominators: Tensor,
    q: Tensor,
    summaries: Tensor,
    mixing: Tensor,
    layout: BlockLayout,
    features: Features,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mhla_diffusion.ops.tiled.read_backward`."""
    mixed = mix(mixing, summaries).contiguous()
    grad_q, grad_mixed = torch.empty_like(q), torch.empty_like(mixed)
    quotient = (out, denominators, torch.empty_like(denominators)) if features.normalized else None
    _rows(q, grad, mixed, grad_q, layout, features, quotient)
    _outer(q, grad, grad_mixed, layout, features, quotient)
    grad_weights = grad_mixed.flatten(3) @ summaries.flatten(3).mT  # [B, H, M_q, M_k]
    grad_mixing = grad_weights.sum(0 if mixing.ndim == 3 else (0, 1))
    return grad_q, mix(mixing.mT, grad_mixed), grad_mixing


# What a quotient o = n / den adds to its gradients: o, den, and the gradient of den that _rows fills in.
_Quotient = tuple[Tensor, Tensor, Tensor]


def _outer(
    x: Tensor,
    v: Tensor,
    summaries: Tensor,
    layout: BlockLayout,
    features: Features,
    quotient: _Quotient | None = None,
) -> None:
    """Summaries of values and features of x; of ``v / den``, and with the gradient of den for the sums."""
    arguments, options = _common(x, v.shape[-1], layout, features, most_channels=32)
    den, den_grad = (quotient[1], quotient[2]) if quotient else (None, None)
    grid = (layout.num_blocks, x.shape[0] * x.shape[1], triton.cdiv(v.shape[-1], options["DV_TILE"]))
    _outer_kernel[grid](
        x, v, summaries, den, den_grad, *x.stride(), *v.stride(), *_strides(den), *arguments,
        QUOTIENT=quotient is not None, **options,
    )  # fmt: skip


def _inner(
    x: Tensor,
    summaries: Tensor,
    out: Tensor,
    denominators: Tensor | None,
    layout: BlockLayout,
    features: Features,
) -> None:
    """Products of features of x and summaries, divided by the denominators where these are asked for."""
    arguments, options = _common(x, out.shape[-1], layout, features, most_channels=64)
    grid = (layout.num_blocks, x.shape[0] * x.shape[1], triton.cdiv(out.shape[-1], options["DV_TILE"]))
    _inner_kernel[grid](
        x, summaries, out, denominators, *x.stride(), *out.stride(), *_strides(denominators), *arguments,
        QUOTIENT=denominators is not None, **options,
    )  # fmt: skip


def _rows(
    x: Tensor,
    v: Tensor,
    summaries: Tensor,
    grad: Tensor,
    layout: BlockLayout,
    features: Features,
    quotient: _Quotient | None = None,
) -> None:
    """The gradient of x, where ``summaries`` and ``v`` multiply its features."""
    arguments, options = _common(x, v.shape[-1], layout, features, most_channels=32)
    out, den, den_grad = quotient or (None, None, None)
    _rows_kernel[(layout.num_blocks, x.shape[0] * x.shape[1])](
        x, v, summaries, grad, out, den, den_grad, *x.stride(), *v.stride(), *grad.stride(), *_strides(out),
        *_strides(den), *arguments, QUOTIENT=quotient is not None, **options,
    )  # fmt: skip


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else x.stride()


def _common(
    x: Tensor, channels: int, layout: BlockLayout, features: Features, *, most_channels: int
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Arguments and compile-time options that all kernels take.

    ``most_channels`` of a summary are in work at a time, half as many where heads are wider than 128. With
    these numbers compute capabilities 8.0 and 9.0 keep all in registers (next to nothing is spilled at d =
    128) and need at most 128 KB of shared memory. With 64 channels in :func:`_outer_kernel` Triton 3.8 fails
    to compile TF32 for Hopper.
    """
    rotary, mask = features.rotary, features.mask
    if rotary is not None:
        rotary = rotary.float().expand(*x.shape[:-1], -1)
    grid, blocks = ((1,) * (3 - len(y)) + y for y in (layout.grid, layout.blocks))
    precision = "tf32"
    if x.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
        precision = "ieee"
    d = max(16, triton.next_power_of_2(x.shape[-1]))
    arguments = (
        rotary, *_strides(rotary)[:3], mask, *((0, 0) if mask is None else mask.stride()),
        x.shape[1], x.shape[-1], channels, features.eps, *grid, *blocks,
    )  # fmt: skip
    options: dict[str, object] = {
        "FEATURE_MAP": FEATURE_MAPS.index(features.feature_map), "NORMALIZED": features.normalized,
        "ROTARY": rotary is not None, "MASK": mask is not None, "PRECISION": precision,
        "ROWS": _ROWS, "D": d,
        "DV_TILE": min(max(16, triton.next_power_of_2(channels)), most_channels if d <= 128 else 32),
        "num_warps": 4 if d <= 64 else 8, "num_stages": 2,
    }  # fmt: skip
    return arguments, options


@triton.jit
def _axis(block, tokens, blocks):
    """The first token of a block along an axis, and its number of tokens."""
    size = tokens // blocks
    longer = tokens % blocks
    return block * size + tl.minimum(block, longer), size + tl.where(block < longer, 1, 0)


@triton.jit
def _box(block, g0, g1, g2, b0, b1, b2):
    """First tokens and sizes along the three axes."""
    start0, n0 = _axis(block // (b1 * b2), g0, b0)
    start1, n1 = _axis(block // b2 % b1, g1, b1)
    start2, n2 = _axis(block % b2, g2, b2)
    return start0, start1, start2, n0, n1, n2


@triton.jit
def _token(row, start0, start1, start2, n1, n2, g1, g2):
    """The number on the grid of a row of a block."""
    return ((start0 + row // (n1 * n2)) * g1 + start1 + row // n2 % n1) * g2 + start2 + row % n2


@triton.jit
def _phi(x, column, width, eps, FEATURE_MAP: tl.constexpr):
    """Features, and zero in the padding."""
    if FEATURE_MAP == 0:
        y = tl.maximum(x, 0.0) + eps
    elif FEATURE_MAP == 1:
        y = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    else:
        x = tl.where(column[None, :] < width, x, float("-inf"))
        y = tl.exp(x - tl.max(x, 1)[:, None])
        y = y / tl.sum(y, 1)[:, None]
    return tl.where(column[None, :] < width, y, 0.0)


@triton.jit
def _phi_backward(grad, x, y, FEATURE_MAP: tl.constexpr):
    if FEATURE_MAP == 0:
        grad = tl.where(x > 0, grad, 0.0)
    elif FEATURE_MAP == 1:
        grad = grad * tl.minimum(y, 1.0)
    else:
        grad = y * (grad - tl.sum(grad * y, 1)[:, None])
    return grad


@triton.jit
def _rotate(x, cos, sin, ROWS: tl.constexpr, D: tl.constexpr):
    """Turn neighbouring columns; cos and sin [ROWS, D / 2]."""
    even, odd = tl.split(tl.reshape(x, (ROWS, D // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, D))


@triton.jit
def _angles(rotary, token, inside, stride, width, D: tl.constexpr):
    """Cosines and sines of the tokens, [ROWS, D / 2]."""
    pair = 2 * tl.arange(0, D // 2)
    place = rotary + token[:, None] * stride + pair[None, :]
    valid = inside[:, None] & (pair[None, :] < width)
    return tl.load(place, valid, 1.0), tl.load(place + 1, valid, 0.0)


@triton.jit
def _load(x, token, inside, stride_n, column, stride_d, width):
    """Rows of x as float32, [ROWS, columns]; zero outside."""
    valid = inside[:, None] & (column[None, :] < width)
    place = x + token[:, None].to(tl.int64) * stride_n + column[None, :] * stride_d
    return tl.load(place, valid, 0.0).to(tl.float32)


@triton.jit
def _store(x, value, token, inside, stride_n, column, stride_d, width):
    valid = inside[:, None] & (column[None, :] < width)
    place = x + token[:, None].to(tl.int64) * stride_n + column[None, :] * stride_d
    tl.store(place, value.to(x.dtype.element_ty), valid)


@triton.jit
def _counted(mask, b, token, inside, stride_b, stride_n, MASK: tl.constexpr):
    """Which rows count: those of the block that no mask hides."""
    if MASK:
        inside = inside & (tl.load(mask + b * stride_b + token * stride_n, inside, 0) != 0)
    return inside


@triton.jit
def _outer_kernel(
    x, v, summaries, den, den_grad,
    x_b, x_h, x_n, x_d, v_b, v_h, v_n, v_d, den_b, den_h, den_n, _den_d,
    rotary, r_b, r_h, r_n, mask, mask_b, mask_n, heads, width, channels, eps, g0, g1, g2, b0, b1, b2,
    QUOTIENT: tl.constexpr, FEATURE_MAP: tl.constexpr, NORMALIZED: tl.constexpr, ROTARY: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DV_TILE: tl.constexpr,
):  # fmt: skip
    block, b, h = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    b, h = b.to(tl.int64), h.to(tl.int64)
    start0, start1, start2, n0, n1, n2 = _box(block, g0, g1, g2, b0, b1, b2)
    column = tl.arange(0, D)
    channel = tl.program_id(2) * DV_TILE + tl.arange(0, DV_TILE)
    total = tl.zeros((DV_TILE, D), tl.float32)
    sums = tl.zeros((D,), tl.float32)
    for first in range(0, n0 * n1 * n2, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < n0 * n1 * n2
        token = _token(row, start0, start1, start2, n1, n2, g1, g2)
        counts = _counted(mask, b, token, inside, mask_b, mask_n, MASK)
        plain = _load(x + b * x_b + h * x_h, token, inside, x_n, column, x_d, width)
        plain = tl.where(counts[:, None], _phi(plain, column, width, eps, FEATURE_MAP), 0.0)
        # Loaded as columns, so that nothing is transposed in registers.
        valid = inside[None, :] & (channel[:, None] < channels)
        place = v + b * v_b + h * v_h + token[None, :].to(tl.int64) * v_n + channel[:, None] * v_d
        values = tl.load(place, valid, 0.0).to(tl.float32)
        rotated = plain
        if ROTARY:
            cos, sin = _angles(rotary + b * r_b + h * r_h, token, inside, r_n, width, D)
            rotated = _rotate(plain, cos, sin, ROWS, D)
        if QUOTIENT:
            place = b * den_b + h * den_h + token * den_n
            values = values / tl.load(den + place, inside, 1.0)[None, :]
            sums += tl.sum(plain * tl.load(den_grad + place, inside, 0.0)[:, None], 0)
        elif NORMALIZED:
            sums += tl.sum(plain, 0)
        total += tl.dot(values, rotated, input_precision=PRECISION)
    height = channels + (1 if NORMALIZED else 0)
    blocks = b0 * b1 * b2
    summaries += (tl.program_id(1).to(tl.int64) * blocks + block) * height * width
    valid = (channel[:, None] < channels) & (column[None, :] < width)
    tl.store(summaries + channel[:, None] * width + column[None, :], total, valid)
    if NORMALIZED and tl.program_id(2) == 0:
        tl.store(summaries + channels * width + column, sums, column < width)


@triton.jit
def _inner_kernel(
    x, summaries, out, den,
    x_b, x_h, x_n, x_d, o_b, o_h, o_n, o_d, den_b, den_h, den_n, _den_d,
    rotary, r_b, r_h, r_n, mask, mask_b, mask_n, heads, width, channels, eps, g0, g1, g2, b0, b1, b2,
    QUOTIENT: tl.constexpr, FEATURE_MAP: tl.constexpr, NORMALIZED: tl.constexpr, ROTARY: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DV_TILE: tl.constexpr,
):  # fmt: skip
    block, b, h = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    b, h = b.to(tl.int64), h.to(tl.int64)
    start0, start1, start2, n0, n1, n2 = _box(block, g0, g1, g2, b0, b1, b2)
    column = tl.arange(0, D)
    channel = tl.program_id(2) * DV_TILE + tl.arange(0, DV_TILE)
    height = channels + (1 if NORMALIZED else 0)
    summaries += (tl.program_id(1).to(tl.int64) * (b0 * b1 * b2) + block) * height * width
    valid = (channel[:, None] < channels) & (column[None, :] < width)
    matrix = tl.load(summaries + channel[:, None] * width + column[None, :], valid, 0.0)
    sums = tl.zeros((D,), tl.float32)
    if QUOTIENT:
        sums = tl.load(summaries + channels * width + column, column < width, 0.0)
    for first in range(0, n0 * n1 * n2, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < n0 * n1 * n2
        token = _token(row, start0, start1, start2, n1, n2, g1, g2)
        counts = _counted(mask, b, token, inside, mask_b, mask_n, MASK)
        plain = _load(x + b * x_b + h * x_h, token, inside, x_n, column, x_d, width)
        plain = tl.where(counts[:, None], _phi(plain, column, width, eps, FEATURE_MAP), 0.0)
        rotated = plain
        if ROTARY:
            cos, sin = _angles(rotary + b * r_b + h * r_h, token, inside, r_n, width, D)
            rotated = _rotate(plain, cos, sin, ROWS, D)
        product = tl.dot(rotated, tl.trans(matrix), input_precision=PRECISION)
        if QUOTIENT:
            denominator = tl.sum(plain * sums[None, :], 1)
            # Zero where a query sees no key (all masked, or a row of W that is all zero): 0 / 1, not NaN.
            denominator = tl.where(denominator == 0, 1.0, denominator)
            product = product / denominator[:, None]
            if tl.program_id(2) == 0:
                tl.store(den + b * den_b + h * den_h + token * den_n, denominator, inside)
        _store(out + b * o_b + h * o_h, product, token, inside, o_n, channel, o_d, channels)


@triton.jit
def _rows_kernel(
    x, v, summaries, grad, out, den, den_grad,
    x_b, x_h, x_n, x_d, v_b, v_h, v_n, v_d, dx_b, dx_h, dx_n, dx_d, o_b, o_h, o_n, o_d,
    den_b, den_h, den_n, _den_d,
    rotary, r_b, r_h, r_n, mask, mask_b, mask_n, heads, width, channels, eps, g0, g1, g2, b0, b1, b2,
    QUOTIENT: tl.constexpr, FEATURE_MAP: tl.constexpr, NORMALIZED: tl.constexpr, ROTARY: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DV_TILE: tl.constexpr,
):  # fmt: skip
    block, b, h = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    b, h = b.to(tl.int64), h.to(tl.int64)
    start0, start1, start2, n0, n1, n2 = _box(block, g0, g1, g2, b0, b1, b2)
    column = tl.arange(0, D)
    height = channels + (1 if NORMALIZED else 0)
    summaries += (tl.program_id(1).to(tl.int64) * (b0 * b1 * b2) + block) * height * width
    for first in range(0, n0 * n1 * n2, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < n0 * n1 * n2
        token = _token(row, start0, start1, start2, n1, n2, g1, g2)
        place = b * den_b + h * den_h + token * den_n
        rotated = tl.zeros((ROWS, D), tl.float32)
        weight = tl.zeros((ROWS,), tl.float32)  # of the sums
        for tile in range(0, channels, DV_TILE):
            channel = tile + tl.arange(0, DV_TILE)
            values = _load(v + b * v_b + h * v_h, token, inside, v_n, channel, v_d, channels)
            if QUOTIENT:
                values = values / tl.load(den + place, inside, 1.0)[:, None]
                ratio = _load(out + b * o_b + h * o_h, token, inside, o_n, channel, o_d, channels)
                weight -= tl.sum(values * ratio, 1)
            valid = (channel[:, None] < channels) & (column[None, :] < width)
            matrix = tl.load(summaries + channel[:, None] * width + column[None, :], valid, 0.0)
            rotated += tl.dot(values, matrix, input_precision=PRECISION)
        plain = rotated
        if ROTARY:
            cos, sin = _angles(rotary + b * r_b + h * r_h, token, inside, r_n, width, D)
            plain = _rotate(rotated, cos, -sin, ROWS, D)
        if NORMALIZED:
            sums = tl.load(summaries + channels * width + column, column < width, 0.0)
            if QUOTIENT:
                tl.store(den_grad + place, weight, inside)
                plain += weight[:, None] * sums[None, :]
            else:
                plain += sums[None, :]
        counts = _counted(mask, b, token, inside, mask_b, mask_n, MASK)
        plain = tl.where(counts[:, None], plain, 0.0)
        values = _load(x + b * x_b + h * x_h, token, inside, x_n, column, x_d, width)
        y = _phi(values, column, width, eps, FEATURE_MAP)
        result = _phi_backward(plain, values, y, FEATURE_MAP)
        _store(grad + b * dx_b + h * dx_h, result, token, inside, dx_n, column, dx_d, width)
