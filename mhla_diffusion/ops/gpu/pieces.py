"""Pieces that the kernels of :mod:`mhla_diffusion.ops.gpu.kernels` are made of.

Rows of 72, 80 or 88 channels are held in two tiles, the first 64 channels and the rest (TAIL), so that less
is padded than up to 128: what belongs to the second has a name that ends in ``_2``. A summary is then four
tiles: the first, what is beside it in the second of x (``_x``), below it in the second of v (``_v``), and the
corner.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def part_of_block(starts, heads, blocks, parts, TILES: tl.constexpr, ROWS: tl.constexpr):
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
def count_rows(mask, b, token, inside, stride_b, stride_n, MASK: tl.constexpr):
    """Rows that count: those of the block that no mask hides."""
    if MASK:
        inside = inside & (tl.load(mask + b * stride_b + token * stride_n, inside, 0) != 0)
    return inside


@triton.jit
def places(token, stride, column, VEC: tl.constexpr):
    """Offsets of rows, which begin at multiples of VEC numbers."""
    return tl.multiple_of(token * stride, VEC)[:, None] + column[None, :]


@triton.jit
def operand(x, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Factor of a product: x in bfloat16, or rounded to what TF32 holds, which hardware would cut off."""
    if PRECISION == "tf32":
        wide = x * 8193.0  # 2^13 + 1: what is left after taking 2^13 x away are the upper 11 bits
        x = wide - (wide - x)
    return x.to(OPERAND)


@triton.jit
def phi(
    x, column, counts, eps, COUNT: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    """Features of rows, and with COUNT zero in those that do not count. No product looks at the padding."""
    if FEATURE_MAP == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL).to(x.dtype)
        if COUNT:  # rows that do not are zero already
            y += tl.where(counts, eps, 0.0).to(x.dtype)[:, None]
        else:
            y += tl.full((1, 1), eps, tl.float32).to(x.dtype)
    elif FEATURE_MAP == "elu":
        y = tl.exp(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)) + tl.maximum(x, 0.0)
    else:
        tl.static_assert(FEATURE_MAP == "softmax", "a feature map that the kernels do not know")
        if WIDTH != D:
            x = tl.where(column[None, :] < WIDTH, x, float("-inf"))
        y = tl.exp(x - tl.max(x, 1)[:, None])
        y = y / tl.sum(y, 1)[:, None]
    if COUNT and FEATURE_MAP != "relu":
        y = tl.where(counts[:, None], y, 0.0)
    return y


@triton.jit
def phi_backward(grad, x, y, FEATURE_MAP: tl.constexpr):
    """Gradient of x; NaN stays NaN."""
    if FEATURE_MAP == "relu":
        grad = tl.where(x <= 0, 0.0, grad)
    elif FEATURE_MAP == "elu":
        grad = grad * tl.minimum(y, 1.0)
    else:
        tl.static_assert(FEATURE_MAP == "softmax", "a feature map that the kernels do not know")
        grad = y * (grad - tl.sum(grad * y, 1)[:, None])
    return grad


@triton.jit
def turn(x, cos, sin, ROWS: tl.constexpr, D: tl.constexpr):
    """Turn neighbouring columns; cos and sin [ROWS, D / 2]."""
    even, odd = tl.split(tl.reshape(x, (ROWS, D // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, D))


@triton.jit
def load_angles(rotary, token, stride, column, valid, ROWS: tl.constexpr, D: tl.constexpr):
    """Cosines and sines of the tokens, [ROWS, D / 2] each, read as the rows they are."""
    table = tl.load(rotary + (token * stride)[:, None] + column[None, :], valid, 0.0)
    return tl.split(tl.reshape(table, (ROWS, D // 2, 2)))


@triton.jit
def load_rows(
    x, token, stride, column, counts, FEATURE_MAP: tl.constexpr, OPERAND: tl.constexpr, WIDTH: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """Rows of x, zero where they do not count; float32, but for what is exact in bfloat16."""
    valid = counts[:, None] & (column[None, :] < WIDTH)
    rows = tl.load(x + places(token, stride, column, VEC), valid, 0.0)
    return rows.to(OPERAND if FEATURE_MAP == "relu" else tl.float32)


@triton.jit
def inverse_rms(
    x, token, stride, counts, eps, WIDTH: tl.constexpr, VEC: tl.constexpr, D: tl.constexpr, TAIL: tl.constexpr
):
    """Inverse of the root mean square of rows of x, of both tiles; 0 for rows that do not count."""
    column = tl.arange(0, D)
    rows = load_values(x, token, stride, column, counts, tl.float32, WIDTH, VEC)
    squares = tl.sum(rows * rows, 1)
    if TAIL:
        rows = load_values(x, token, stride, D + tl.arange(0, TAIL), counts, tl.float32, WIDTH, VEC)
        squares += tl.sum(rows * rows, 1)
    return tl.where(counts, tl.rsqrt(squares / WIDTH + eps), 0.0)


@triton.jit
def load_weights(norm, column, WIDTH: tl.constexpr):
    """Tile of the weights of a norm."""
    return tl.load(norm + column, column < WIDTH, 0.0).to(tl.float32)


@triton.jit
def load_features(
    x, x_n, rotary, r_n, token, counts, column, eps, norm, inverse, COUNT: tl.constexpr,
    FEATURE_MAP: tl.constexpr, NORM: tl.constexpr, ROTARY: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Features of rows of x, behind their norm, as they are and, turned, as a factor of products."""
    rows = load_rows(x, token, x_n, column, counts, FEATURE_MAP, OPERAND, WIDTH, VEC)
    if NORM:
        normed = rows.to(tl.float32) * inverse[:, None] * load_weights(norm, column, WIDTH)[None, :]
        rows = normed.to(rows.dtype)
    plain = phi(rows, column, counts, eps, COUNT, WIDTH, D, FEATURE_MAP)
    turned = plain
    if ROTARY:
        valid = counts[:, None] & (column[None, :] < WIDTH)
        cos, sin = load_angles(rotary, token, r_n, column, valid, ROWS, D)
        turned = turn(plain.to(tl.float32), cos, sin, ROWS, D)
    return plain, operand(turned, OPERAND, PRECISION)


@triton.jit
def load_values(
    v, token, stride, channel, counts, OPERAND: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr
):
    """Tile of the rows of v that count. What others hold must not matter: 0 times NaN is NaN."""
    valid = counts[:, None] & (channel[None, :] < CHANNELS)
    return tl.load(v + places(token, stride, channel, VEC), valid, 0.0).to(OPERAND)


@triton.jit
def load_middle(centre, at, channel, CENTRED: tl.constexpr, CHANNELS: tl.constexpr):
    """Tile of the centre of values, or 0."""
    if CENTRED:
        return tl.load(centre + at * CHANNELS + channel, channel < CHANNELS, 0.0)
    else:
        return 0.0


@triton.jit
def not_zero(den):
    """Denominators to divide by. One is zero where a query sees no key: 0 / 1, not NaN."""
    return tl.where(den == 0, 1.0, den)


@triton.jit
def load_factor(
    v, v_n, den, middle, token, counts, channel, QUOTIENT: tl.constexpr, CENTRED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Rows of v as a factor of products: over ``den``, or less ``middle``, which is as narrow as they are."""
    values = load_values(v, token, v_n, channel, counts, OPERAND, CHANNELS, VEC)
    if QUOTIENT:
        values = values.to(tl.float32) / not_zero(tl.load(den + token, counts, 1.0))[:, None]
    elif CENTRED:
        values -= middle.to(OPERAND)[None, :]
    return operand(values, OPERAND, PRECISION)


@triton.jit
def summary_at(summaries, at, stride, channel, column, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Places of a tile of a summary, and what of it exists."""
    valid = (channel[:, None] < CHANNELS) & (column[None, :] < WIDTH)
    start = tl.multiple_of(at * stride, WIDTH & -WIDTH)  # the largest power of two in WIDTH
    return summaries + start + channel[:, None] * WIDTH + column[None, :], valid


@triton.jit
def load_matrix(
    summaries, at, stride, channel, column, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile of a summary, as a factor of products."""
    place, valid = summary_at(summaries, at, stride, channel, column, CHANNELS, WIDTH)
    return operand(tl.load(place, valid, 0.0).to(tl.float32), OPERAND, PRECISION)


@triton.jit
def load_borders(
    summaries, at, stride, channel, column, channel_2, column_2, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of a summary beside its first one, below it, and beside and below it."""
    beside = load_matrix(summaries, at, stride, channel, column_2, CHANNELS, WIDTH, OPERAND, PRECISION)
    below = load_matrix(summaries, at, stride, channel_2, column, CHANNELS, WIDTH, OPERAND, PRECISION)
    corner = load_matrix(summaries, at, stride, channel_2, column_2, CHANNELS, WIDTH, OPERAND, PRECISION)
    return beside, below, corner


@triton.jit
def store_summary(summaries, at, stride, total, channel, column, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Write a tile of a summary."""
    place, valid = summary_at(summaries, at, stride, channel, column, CHANNELS, WIDTH)
    tl.store(place, total.to(summaries.dtype.element_ty), valid)


@triton.jit
def put_beside(tile, y, place, FREE: tl.constexpr):
    """Put y into a tile of bfloat16, at FREE and the two places after it: three numbers whose sum it is."""
    first = y.to(tl.bfloat16).to(tl.float32)
    second = (y - first).to(tl.bfloat16).to(tl.float32)
    tile = tl.where(place == FREE, first, tile)
    tile = tl.where(place == FREE + 1, second, tile)
    return tl.where(place == FREE + 2, y - first - second, tile).to(tl.bfloat16)


@triton.jit
def sum_beside(product, channel, FREE: tl.constexpr):
    """Products with what was put beside other channels."""
    return tl.sum(tl.where(channel[None, :] >= FREE, product, 0.0), 1)


@triton.jit
def fold(x, ROWS: tl.constexpr, KEPT: tl.constexpr, D: tl.constexpr):
    """Sums of every KEPT-th row, [KEPT, D]: what a loop adds up in few registers, and without a shuffle."""
    return tl.sum(tl.reshape(x, (ROWS // KEPT, KEPT, D)), 0)


@triton.jit
def store_rows(y, token, stride, rows, column, inside, WIDTH: tl.constexpr, VEC: tl.constexpr):
    """Write rows of tokens inside the block."""
    valid = inside[:, None] & (column[None, :] < WIDTH)
    tl.store(y + places(token, stride, column, VEC), rows.to(y.dtype.element_ty), valid)


@triton.jit
def write_gradient(
    dx, dx_n, grad, x, x_n, token, inside, counts, column, eps, COUNT: tl.constexpr,
    FEATURE_MAP: tl.constexpr, OPERAND: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write the gradient of rows of x, given that of their features, and return the features."""
    rows = load_rows(x, token, x_n, column, counts, FEATURE_MAP, OPERAND, WIDTH, VEC)
    features = phi(rows, column, counts, eps, COUNT, WIDTH, D, FEATURE_MAP).to(tl.float32)
    result = phi_backward(grad, rows, features, FEATURE_MAP)
    store_rows(dx, token, dx_n, result, column, inside, WIDTH, VEC)
    return features


@triton.jit
def outputs_of(product, inverse, seen, middle, NORMALIZED: tl.constexpr, CENTRED: tl.constexpr):
    """Products times ``inverse``, with the centre that was taken off before where keys are seen."""
    if NORMALIZED:
        product = product * inverse[:, None]
        if CENTRED:
            product += middle[None, :] * seen[:, None]
    return product


@triton.jit
def sum_of_squares(product, channel, CHANNELS: tl.constexpr):
    """Sum of squares of each row; beside its channels there may be sums."""
    product = tl.where(channel[None, :] < CHANNELS, product, 0.0)
    return tl.sum(product * product, 1)


@triton.jit
def write(
    v, v_n, product, token, inside, channel, norm, inverse, gate, gate_n, OUT_NORM: tl.constexpr,
    GATE: tl.constexpr, SATURATE: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Write outputs to rows of v, behind their norm and ``SiLU(gate)``."""
    if OUT_NORM:
        product = product * inverse[:, None] * load_weights(norm, channel, CHANNELS)[None, :]
    if GATE:
        opened = load_values(gate, token, gate_n, channel, inside, tl.float32, CHANNELS, VEC)
        root = tl.rsqrt(1.0 + tl.exp(-opened))  # squared a quotient, in a third of the instructions
        product = product * opened * root * root
    if SATURATE:
        product = tl.maximum(product, -65504.0, propagate_nan=tl.PropagateNan.ALL)
        product = tl.minimum(product, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    store_rows(v, token, v_n, product, channel, inside, CHANNELS, VEC)
