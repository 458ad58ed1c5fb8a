"""Small kernels that make of W what mixes summaries, and its gradient; a program takes a row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _weights(
    mixing, w_b, w_h, w_m, w_n, heads, rows, columns, filled, COLUMNS: tl.constexpr, SCALED: tl.constexpr
):
    """A row of W, the power of two that scales it (see composite._row_scale), and where it is."""
    number = tl.program_id(0).to(tl.int64)
    row, rest = number % filled, number // filled
    column = tl.arange(0, COLUMNS)
    place = mixing + rest // heads * w_b + rest % heads * w_h + row * w_m + column.to(tl.int64) * w_n
    weights = tl.load(place, (row < rows) & (column < columns), 0.0).to(tl.float32)
    scale = 1.0
    if SCALED:
        # In bits, which are in the order of the numbers, and NaN above all.
        largest = tl.max(weights.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        exponent = tl.where(largest == 0, 126, tl.maximum(largest >> 23, 1))  # all zero: by 1
        small = 0x00400000 >> tl.maximum(exponent - 253, 0)  # below the smallest normal number
        bits = tl.where(exponent < 253, (253 - exponent) << 23, small)
        scale = tl.where(exponent < 255, bits, 0x7FC00000).to(tl.float32, bitcast=True)
    return weights, scale, number, row, rest, column


@triton.jit(do_not_specialize=["heads", "rows", "columns", "filled", "width"])
def weights_kernel(
    mixing, narrow, wide, w_b, w_h, w_m, w_n, heads, rows, columns, filled, width,
    COLUMNS: tl.constexpr, SCALED: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """Weights that mix summaries: W scaled, filled up with zeros, in their dtype and, MORE, in float32."""
    weights, scale, number, _row, _rest, column = _weights(
        mixing, w_b, w_h, w_m, w_n, heads, rows, columns, filled, COLUMNS, SCALED
    )
    weights = tl.where(column < columns, weights * scale, 0.0)
    place, valid = number * width + column, column < width
    tl.store(narrow + place, weights.to(narrow.dtype.element_ty), valid)
    if MORE:
        tl.store(wide + place, weights, valid)


@triton.jit(do_not_specialize=["heads", "rows", "columns", "filled", "width"])
def weights_grad_kernel(
    mixing, grad, more, out, w_b, w_h, w_m, w_n, heads, rows, columns, filled, width,
    COLUMNS: tl.constexpr, SCALED: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """Gradient of W from that of what ``weights`` makes of it or, MORE, from two that have to be added."""
    _row, scale, number, row, rest, column = _weights(
        mixing, w_b, w_h, w_m, w_n, heads, rows, columns, filled, COLUMNS, SCALED
    )
    valid = (row < rows) & (column < columns)
    total = tl.load(grad + number * width + column, valid, 0.0).to(tl.float32)
    if MORE:
        total += tl.load(more + number * width + column, valid, 0.0)
    total = (total * scale).to(out.dtype.element_ty)
    tl.store(out + (rest * rows + row) * columns + column, total, valid)
