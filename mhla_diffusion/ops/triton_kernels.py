"""What :mod:`mhla_diffusion.ops.triton_mhla` launches: one axis of programs, each on tokens of one block.

A program finds its tokens in ``order`` (tokens sorted by block, ``[N]``) between ``starts[block]`` and
``starts[block + 1]``; long blocks are shared by several programs (parts). Programs that follow each other are
heads of the same tokens: neighbours in memory, with the same order and angles.

Names: x is q or k, ``[B, H, N, WIDTH]``; v the other factor, ``[B, H, N, CHANNELS]``; both with channels
side by side. A summary is ``[CHANNELS, WIDTH]``, the sum of features beside it ``[WIDTH]``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(starts, heads, blocks, parts, TILES: tl.constexpr, ROWS: tl.constexpr):
    """Sample, head, tile of channels, number of the summary, and first and last place in ``order``."""
    pid = tl.program_id(0)
    h = pid % heads
    rest = pid // heads
    tile = rest % TILES
    rest = rest // TILES
    part = rest % parts
    rest = rest // parts
    block = rest % blocks
    b = (rest // blocks).to(tl.int64)
    start, end = tl.load(starts + block), tl.load(starts + block + 1)
    share = tl.cdiv(end - start, parts * ROWS) * ROWS
    first = start + part * share
    return b, h.to(tl.int64), tile, block, part, first, tl.minimum(first + share, end)


@triton.jit
def _phi(x, column, eps, WIDTH: tl.constexpr, D: tl.constexpr, FEATURE_MAP: tl.constexpr):
    """Features, and zero in the padding."""
    if FEATURE_MAP == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + eps
    elif FEATURE_MAP == "elu":
        y = tl.exp(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)) + tl.maximum(x, 0.0)
    else:
        tl.static_assert(FEATURE_MAP == "softmax", "a feature map that the kernels do not know")
        if WIDTH != D:
            x = tl.where(column[None, :] < WIDTH, x, float("-inf"))
        y = tl.exp(x - tl.max(x, 1)[:, None])
        y = y / tl.sum(y, 1)[:, None]
    if WIDTH != D:
        y = tl.where(column[None, :] < WIDTH, y, 0.0)
    return y


@triton.jit
def _phi_backward(grad, x, y, FEATURE_MAP: tl.constexpr):
    """The gradient of x; NaN stays NaN."""
    if FEATURE_MAP == "relu":
        grad = tl.where(x <= 0, 0.0, grad)
    elif FEATURE_MAP == "elu":
        grad = grad * tl.minimum(y, 1.0)
    else:
        tl.static_assert(FEATURE_MAP == "softmax", "a feature map that the kernels do not know")
        grad = y * (grad - tl.sum(grad * y, 1)[:, None])
    return grad


@triton.jit
def _turn(x, cos, sin, ROWS: tl.constexpr, D: tl.constexpr):
    """Turn neighbouring columns; cos and sin [ROWS, D / 2]."""
    even, odd = tl.split(tl.reshape(x, (ROWS, D // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, D))


@triton.jit
def _angles(rotary, token, stride, column, valid, ROWS: tl.constexpr, D: tl.constexpr):
    """Cosines and sines of the tokens, [ROWS, D / 2] each, read as the rows they are."""
    table = tl.load(rotary + (token * stride)[:, None] + column[None, :], valid, 0.0)
    return tl.split(tl.reshape(table, (ROWS, D // 2, 2)))


@triton.jit
def _operand(x, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Factor of a product: x in bfloat16, or rounded to what TF32 holds, which hardware would cut off."""
    if PRECISION == "tf32":
        wide = x * 8193.0  # 2^13 + 1: what is left after taking 2^13 x away are the upper 11 bits
        x = wide - (wide - x)
    return x.to(OPERAND)


@triton.jit
def _counted(mask, b, token, inside, stride_b, stride_n, MASK: tl.constexpr):
    """Which rows count: those of the block that no mask hides."""
    if MASK:
        inside = inside & (tl.load(mask + b * stride_b + token * stride_n, inside, 0) != 0)
    return inside


@triton.jit
def _places(token, stride, column, VEC: tl.constexpr):
    """Offsets of rows, which begin at multiples of VEC numbers."""
    return tl.multiple_of(token * stride, VEC)[:, None] + column[None, :]


@triton.jit
def _summary(summaries, at, stride, channel, column, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Where a tile of a summary lies, and what of it exists."""
    valid = (channel[:, None] < CHANNELS) & (column[None, :] < WIDTH)
    start = tl.multiple_of(at * stride, WIDTH & -WIDTH)  # the largest power of two in WIDTH
    return summaries + start + channel[:, None] * WIDTH + column[None, :], valid


@triton.jit
def _matrix(
    summaries, at, stride, channel, column, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of a summary, as a factor of products."""
    place, valid = _summary(summaries, at, stride, channel, column, CHANNELS, WIDTH)
    return _operand(tl.load(place, valid, 0.0).to(tl.float32), OPERAND, PRECISION)


@triton.jit
def _values(v, token, stride, channel, counts, CHANNELS: tl.constexpr, VEC: tl.constexpr):
    """A tile of the rows of v that count. What others hold must not matter: 0 times NaN is NaN."""
    valid = counts[:, None] & (channel[None, :] < CHANNELS)
    return tl.load(v + _places(token, stride, channel, VEC), valid, 0.0).to(tl.float32)


@triton.jit
def _folded(x, ROWS: tl.constexpr, KEPT: tl.constexpr, D: tl.constexpr):
    """Sums of every KEPT-th row, [KEPT, D]: what a loop adds up in few registers, and without a shuffle."""
    return tl.sum(tl.reshape(x, (ROWS // KEPT, KEPT, D)), 0)


@triton.jit(do_not_specialize=["heads", "tokens", "step"])
def centre_kernel(
    v, centre, mask, v_b, v_h, v_n, v_d, mask_b, mask_n, heads, tokens, step,
    MASK: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Mean of every step-th value, rounded to what the largest of them hold in bfloat16.

    So rounded, ``v - centre`` is exact for most values. Else its error would be the same for all that share
    an exponent, and would not average out.
    """
    row = (tl.program_id(0) // TILES).to(tl.int64)
    b, h = row // heads, row % heads
    channel = tl.program_id(0) % TILES * DV + tl.arange(0, DV)
    total = tl.zeros((ROWS, DV), tl.float32)
    largest = tl.zeros((ROWS, DV), tl.float32)
    number = tl.zeros((ROWS,), tl.float32)
    for first in range(0, tokens, ROWS * step):
        token = first + tl.arange(0, ROWS).to(tl.int64) * step
        counts = _counted(mask, b, token, token < tokens, mask_b, mask_n, MASK)
        place = v + b * v_b + h * v_h + token[:, None] * v_n + channel[None, :] * v_d
        values = tl.load(place, counts[:, None] & (channel[None, :] < CHANNELS), 0.0).to(tl.float32)
        total += values
        largest = tl.maximum(largest, tl.abs(values))
        number += counts.to(tl.float32)
    mean = tl.sum(total, 0) / tl.maximum(tl.sum(number, 0), 1.0)
    power = (tl.max(largest, 0).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.maximum(power, 1e-30) / 128
    mean = tl.floor(mean / unit + 0.5) * unit
    mean = tl.where(tl.abs(mean) < float("inf"), mean, 0.0)
    tl.store(centre + row * CHANNELS + channel, mean, channel < CHANNELS)


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
        exponent = tl.maximum(largest >> 23, 1)
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


@triton.jit(do_not_specialize=["heads", "blocks", "parts", "tokens", "eps"])
def outer_kernel(
    x, v, summaries, sums, centre, den, den_grad, order, starts, rotary, mask,
    x_b, x_h, x_n, v_b, v_h, v_n, r_b, r_h, r_n, mask_b, mask_n, summary_stride, sums_stride,
    heads, blocks, parts, tokens, eps,
    QUOTIENT: tl.constexpr, NORMALIZED: tl.constexpr, CENTRED: tl.constexpr,
    FEATURE_MAP: tl.constexpr, ROTARY: tl.constexpr, MASK: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, X_VEC: tl.constexpr,
    V_VEC: tl.constexpr, ROWS: tl.constexpr, KEPT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Summaries of values and features of x, and the sums of features.

    CENTRED: of ``v - centre``. QUOTIENT: of ``v / den``, and of features times ``den_grad``.
    """
    b, h, tile, block, part, first, last = _place(starts, heads, blocks, parts, TILES, ROWS)
    column, channel = tl.arange(0, D), tile * DV + tl.arange(0, DV)
    x += tl.multiple_of(b * x_b + h * x_h, X_VEC)
    v += tl.multiple_of(b * v_b + h * v_h, V_VEC)
    if CENTRED:
        middle = tl.load(centre + (b * heads + h) * CHANNELS + channel, channel < CHANNELS, 0.0)
    total = tl.zeros((DV, D), tl.float32)
    features = tl.zeros((KEPT, D), tl.float32)
    slot = first + tl.arange(0, ROWS)
    following = tl.load(order + slot, slot < last, 0)  # a step ahead, as what is loaded next depends on it
    for row in range(first, last, ROWS):
        slot = row + tl.arange(0, ROWS)
        inside = slot < last
        token = following.to(tl.int64)
        following = tl.load(order + slot + ROWS, slot + ROWS < last, 0)
        counts = _counted(mask, b, token, inside, mask_b, mask_n, MASK)
        real = inside[:, None] & (column[None, :] < WIDTH)
        plain = tl.load(x + _places(token, x_n, column, X_VEC), real, 0.0).to(tl.float32)
        plain = tl.where(counts[:, None], _phi(plain, column, eps, WIDTH, D, FEATURE_MAP), 0.0)
        values = _values(v, token, v_n, channel, counts, CHANNELS, V_VEC)
        if QUOTIENT:
            at = (b * heads + h) * tokens + token
            values = values / tl.load(den + at, inside, 1.0)[:, None]
            features += _folded(plain * tl.load(den_grad + at, inside, 0.0)[:, None], ROWS, KEPT, D)
        else:
            if NORMALIZED:
                features += _folded(plain, ROWS, KEPT, D)
            if CENTRED:
                values = values - middle[None, :]
        rotated = plain
        if ROTARY:
            cos, sin = _angles(rotary + b * r_b + h * r_h, token, r_n, column, real, ROWS, D)
            rotated = _turn(plain, cos, sin, ROWS, D)
        factor = _operand(values, OPERAND, PRECISION)
        total = tl.dot(
            tl.trans(factor), _operand(rotated, OPERAND, PRECISION), total, input_precision=PRECISION
        )
    at = ((b * heads + h) * blocks + block) * parts + part
    place, valid = _summary(summaries, at, summary_stride, channel, column, CHANNELS, WIDTH)
    tl.store(place, total.to(summaries.dtype.element_ty), valid)
    if NORMALIZED and tile == 0:
        tl.store(sums + at * sums_stride + column, tl.sum(features, 0), column < WIDTH)


@triton.jit(do_not_specialize=["heads", "blocks", "parts", "tokens", "eps"])
def inner_kernel(
    x, v, summaries, sums, centre, den, order, starts, rotary, x_b, x_h, x_n, v_b, v_h, v_n, r_b, r_h, r_n,
    summary_stride, sums_stride, heads, blocks, parts, tokens, eps,
    NORMALIZED: tl.constexpr, CENTRED: tl.constexpr, SATURATE: tl.constexpr, FEATURE_MAP: tl.constexpr,
    ROTARY: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, X_VEC: tl.constexpr, V_VEC: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write to v products of features of x and summaries; over the denominators, which are stored too."""
    b, h, tile, block, _part, first, last = _place(starts, heads, blocks, parts, TILES, ROWS)
    column, channel = tl.arange(0, D), tile * DV + tl.arange(0, DV)
    x += tl.multiple_of(b * x_b + h * x_h, X_VEC)
    v += tl.multiple_of(b * v_b + h * v_h, V_VEC)
    at = (b * heads + h) * blocks + block
    matrix = _matrix(summaries, at, summary_stride, channel, column, CHANNELS, WIDTH, OPERAND, PRECISION)
    if NORMALIZED:
        z = tl.load(sums + at * sums_stride + column, column < WIDTH, 0.0)
    if CENTRED:
        middle = tl.load(centre + (b * heads + h) * CHANNELS + channel, channel < CHANNELS, 0.0)
    slot = first + tl.arange(0, ROWS)
    following = tl.load(order + slot, slot < last, 0)  # a step ahead, as what is loaded next depends on it
    for row in range(first, last, ROWS):
        slot = row + tl.arange(0, ROWS)
        inside = slot < last
        token = following.to(tl.int64)
        following = tl.load(order + slot + ROWS, slot + ROWS < last, 0)
        real = inside[:, None] & (column[None, :] < WIDTH)
        plain = tl.load(x + _places(token, x_n, column, X_VEC), real, 0.0).to(tl.float32)
        plain = _phi(plain, column, eps, WIDTH, D, FEATURE_MAP)
        rotated = plain
        if ROTARY:
            cos, sin = _angles(rotary + b * r_b + h * r_h, token, r_n, column, real, ROWS, D)
            rotated = _turn(plain, cos, sin, ROWS, D)
        factor = _operand(rotated, OPERAND, PRECISION)
        product = tl.dot(factor, tl.trans(matrix), input_precision=PRECISION)
        if NORMALIZED:
            denominator = tl.sum(plain * z[None, :], 1)
            # Zero where a query sees no key (all masked, or a row of W that is all zero): 0 / 1, not NaN.
            blind = denominator == 0
            denominator = tl.where(blind, 1.0, denominator)
            product = product * (1.0 / denominator)[:, None]
            if CENTRED:
                product += tl.where(blind[:, None], 0.0, middle[None, :])
            if tile == 0:
                tl.store(den + (b * heads + h) * tokens + token, denominator, inside)
        if SATURATE:
            product = tl.maximum(product, -65504.0, propagate_nan=tl.PropagateNan.ALL)
            product = tl.minimum(product, 65504.0, propagate_nan=tl.PropagateNan.ALL)
        written = inside[:, None] & (channel[None, :] < CHANNELS)
        tl.store(v + _places(token, v_n, channel, V_VEC), product.to(v.dtype.element_ty), written)


@triton.jit(do_not_specialize=["heads", "blocks", "parts", "tokens", "eps"])
def queries_kernel(
    x, v, dx, summaries, sums, matrix_grads, sum_grads, den, den_grad, order, starts, rotary,
    x_b, x_h, x_n, v_b, v_h, v_n, dx_b, dx_h, dx_n, r_b, r_h, r_n, summary_stride, sums_stride,
    heads, blocks, parts, tokens, eps,
    FUSED: tl.constexpr, NORMALIZED: tl.constexpr, FEATURE_MAP: tl.constexpr, ROTARY: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    X_VEC: tl.constexpr, V_VEC: tl.constexpr, ROWS: tl.constexpr, KEPT: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Gradient of queries x, where v is the gradient g of the output, and, FUSED, of their summaries S.

    NORMALIZED: the output is ``o = n / den``. With ``u = S^T g / den`` the features f get
    ``u - (f . u / den) z``: g . o is f . u, so that no o is read, and what is left is orthogonal to f.
    Where ``outer`` is to find the gradient of S, that of den is stored for it.
    """
    b, h, _tile, block, part, first, last = _place(starts, heads, blocks, parts, 1, ROWS)
    column, all_channels = tl.arange(0, D), tl.arange(0, DV)
    x += tl.multiple_of(b * x_b + h * x_h, X_VEC)
    v += tl.multiple_of(b * v_b + h * v_h, V_VEC)
    dx += tl.multiple_of(b * dx_b + h * dx_h, X_VEC)
    at = (b * heads + h) * blocks + block
    if NORMALIZED:
        z = tl.load(sums + at * sums_stride + column, column < WIDTH, 0.0)
    if TILES == 1:
        matrix = _matrix(
            summaries, at, summary_stride, all_channels, column, CHANNELS, WIDTH, OPERAND, PRECISION
        )
    if FUSED:
        total = tl.zeros((DV, D), tl.float32)
        weighted = tl.zeros((KEPT, D), tl.float32)
    slot = first + tl.arange(0, ROWS)
    following = tl.load(order + slot, slot < last, 0)  # a step ahead, as what is loaded next depends on it
    for row in range(first, last, ROWS):
        slot = row + tl.arange(0, ROWS)
        inside = slot < last
        token = following.to(tl.int64)
        following = tl.load(order + slot + ROWS, slot + ROWS < last, 0)
        real = inside[:, None] & (column[None, :] < WIDTH)
        if TILES == 1:
            values = _values(v, token, v_n, all_channels, inside, CHANNELS, V_VEC)
            factor = _operand(values, OPERAND, PRECISION)
            plain = tl.dot(factor, matrix, input_precision=PRECISION)
        else:
            plain = tl.zeros((ROWS, D), tl.float32)
            for tile in range(0, TILES):  # not unrolled, or all tiles would be held at once
                channel = tile * DV + all_channels
                matrix = _matrix(
                    summaries, at, summary_stride, channel, column, CHANNELS, WIDTH, OPERAND, PRECISION
                )
                values = _values(v, token, v_n, channel, inside, CHANNELS, V_VEC)
                factor = _operand(values, OPERAND, PRECISION)
                plain = tl.dot(factor, matrix, plain, input_precision=PRECISION)
        if ROTARY:
            cos, sin = _angles(rotary + b * r_b + h * r_h, token, r_n, column, real, ROWS, D)
            plain = _turn(plain, cos, -sin, ROWS, D)
        rows = tl.load(x + _places(token, x_n, column, X_VEC), real, 0.0).to(tl.float32)
        features = _phi(rows, column, eps, WIDTH, D, FEATURE_MAP)
        if NORMALIZED:
            at_token = (b * heads + h) * tokens + token
            inverse = 1.0 / tl.load(den + at_token, inside, 1.0)
            plain = plain * inverse[:, None]
            weight = -tl.sum(features * plain, 1) * inverse
            plain += weight[:, None] * z[None, :]
            if FUSED:
                weighted += _folded(features * weight[:, None], ROWS, KEPT, D)
            else:
                tl.store(den_grad + at_token, weight, inside)
        result = _phi_backward(plain, rows, features, FEATURE_MAP)
        tl.store(dx + _places(token, dx_n, column, X_VEC), result.to(dx.dtype.element_ty), real)
        if FUSED:
            if ROTARY:
                features = _turn(features, cos, sin, ROWS, D)
            if NORMALIZED:
                features = features * inverse[:, None]
            turned = _operand(features, OPERAND, PRECISION)
            total = tl.dot(tl.trans(factor), turned, total, input_precision=PRECISION)
    if FUSED:
        at = at * parts + part
        place, valid = _summary(matrix_grads, at, summary_stride, all_channels, column, CHANNELS, WIDTH)
        tl.store(place, total.to(matrix_grads.dtype.element_ty), valid)
        if NORMALIZED:
            tl.store(sum_grads + at * sums_stride + column, tl.sum(weighted, 0), column < WIDTH)


@triton.jit(do_not_specialize=["heads", "blocks", "parts", "eps"])
def keys_kernel(
    x, v, dx, dv, summaries, sums, centre, order, starts, rotary, mask,
    x_b, x_h, x_n, v_b, v_h, v_n, dx_b, dx_h, dx_n, dv_b, dv_h, dv_n, r_b, r_h, r_n, mask_b, mask_n,
    summary_stride, sums_stride, heads, blocks, parts, eps,
    NORMALIZED: tl.constexpr, CENTRED: tl.constexpr, FEATURE_MAP: tl.constexpr, ROTARY: tl.constexpr,
    MASK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, X_VEC: tl.constexpr, V_VEC: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Gradients of keys x and values v, from those of their summaries.

    What the second product needs is computed, or read from a cache, after the first is done, so that
    registers hold one of them at a time.
    """
    b, h, _tile, block, _part, first, last = _place(starts, heads, blocks, parts, 1, ROWS)
    column, all_channels = tl.arange(0, D), tl.arange(0, DV)
    x += tl.multiple_of(b * x_b + h * x_h, X_VEC)
    v += tl.multiple_of(b * v_b + h * v_h, V_VEC)
    dx += tl.multiple_of(b * dx_b + h * dx_h, X_VEC)
    dv += tl.multiple_of(b * dv_b + h * dv_h, V_VEC)
    at = (b * heads + h) * blocks + block
    if TILES == 1:
        matrix = _matrix(
            summaries, at, summary_stride, all_channels, column, CHANNELS, WIDTH, OPERAND, PRECISION
        )
    if CENTRED:  # (v - m) S = v S - m S, which leaves v in few digits, as it is
        z = tl.load(sums + at * sums_stride + column, column < WIDTH, 0.0)
        for tile in range(0, TILES):
            channel = tile * DV + all_channels
            if TILES > 1:
                matrix = _matrix(
                    summaries, at, summary_stride, channel, column, CHANNELS, WIDTH, OPERAND, PRECISION
                )
            middle = tl.load(centre + (b * heads + h) * CHANNELS + channel, channel < CHANNELS, 0.0)
            z -= tl.sum(middle[:, None] * matrix.to(tl.float32), 0)
    slot = first + tl.arange(0, ROWS)
    following = tl.load(order + slot, slot < last, 0)  # a step ahead, as what is loaded next depends on it
    for row in range(first, last, ROWS):
        slot = row + tl.arange(0, ROWS)
        inside = slot < last
        token = following.to(tl.int64)
        following = tl.load(order + slot + ROWS, slot + ROWS < last, 0)
        counts = _counted(mask, b, token, inside, mask_b, mask_n, MASK)
        real = inside[:, None] & (column[None, :] < WIDTH)
        plain = tl.zeros((ROWS, D), tl.float32)
        for tile in range(0, TILES):  # not unrolled, or all tiles would be held at once
            channel = tile * DV + all_channels
            if TILES > 1:
                matrix = _matrix(
                    summaries, at, summary_stride, channel, column, CHANNELS, WIDTH, OPERAND, PRECISION
                )
            values = _values(v, token, v_n, channel, counts, CHANNELS, V_VEC)
            plain = tl.dot(_operand(values, OPERAND, PRECISION), matrix, plain, input_precision=PRECISION)
        if ROTARY:
            cos, sin = _angles(rotary + b * r_b + h * r_h, token, r_n, column, real, ROWS, D)
            plain = _turn(plain, cos, -sin, ROWS, D)
        if NORMALIZED:
            if not CENTRED:
                z = tl.load(sums + at * sums_stride + column, column < WIDTH, 0.0)
            plain += z[None, :]
        rows = tl.load(x + _places(token, x_n, column, X_VEC), real, 0.0).to(tl.float32)
        features = _phi(rows, column, eps, WIDTH, D, FEATURE_MAP)
        if MASK:
            plain = tl.where(counts[:, None], plain, 0.0)
            features = tl.where(counts[:, None], features, 0.0)
        result = _phi_backward(plain, rows, features, FEATURE_MAP)
        tl.store(dx + _places(token, dx_n, column, X_VEC), result.to(dx.dtype.element_ty), real)
        if ROTARY:
            cos, sin = _angles(rotary + b * r_b + h * r_h, token, r_n, column, real, ROWS, D)
            features = _turn(features, cos, sin, ROWS, D)
        turned = _operand(features, OPERAND, PRECISION)
        for tile in range(0, TILES):
            channel = tile * DV + all_channels
            if TILES > 1:
                matrix = _matrix(
                    summaries, at, summary_stride, channel, column, CHANNELS, WIDTH, OPERAND, PRECISION
                )
            product = tl.dot(turned, tl.trans(matrix), input_precision=PRECISION)
            written = inside[:, None] & (channel[None, :] < CHANNELS)
            tl.store(dv + _places(token, dv_n, channel, V_VEC), product.to(dv.dtype.element_ty), written)
