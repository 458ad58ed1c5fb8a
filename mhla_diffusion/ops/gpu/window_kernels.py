"""What :mod:`mhla_diffusion.ops.gpu.window` launches: softmax of queries in a window, a tile at a time.

Each program works on a tile of queries of one block (or, ``keys``, of keys of one window) and goes through
the keys of the window (the queries of the block). Which tokens these are, two tables say, ``[M, places]``
with -1 where a place holds none. Programs that follow each other are heads of the same tokens.

Rows of 72 to 96 channels are held in two tiles, the first 64 channels and the rest (TAIL), so that less is
padded than up to 128: what is of the second has a name that ends in ``_2``, and stands for nothing without.

Logarithms are of base 2: ``scale`` has log2(e) in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import count_rows, operand, places, store_rows

_LOG2_E = tl.constexpr(1.4426950408889634)
# Below all scores, and finite: minus infinity less itself would be NaN.
_LEAST = tl.constexpr(-1e30)


@triton.jit
def _program(heads, blocks, size, ROWS: tl.constexpr):
    """Sample, head, block, and places of the tile among ``size`` of its block."""
    pid = tl.program_id(0)
    h = pid % heads
    rest = pid // heads
    tiles = tl.cdiv(size, ROWS)
    first = rest % tiles * ROWS
    rest = rest // tiles
    return (rest // blocks).to(tl.int64), h.to(tl.int64), rest % blocks, first


@triton.jit
def _tokens(table, block, slot, size, PLACE: tl.constexpr):
    """Tokens at places of a block, and where there are such."""
    token = tl.load(table + block.to(PLACE) * size + slot, slot < size, -1)
    return tl.maximum(token, 0).to(PLACE), token >= 0


@triton.jit
def _tile(
    x, token, stride, column, valid, OPERAND: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """Some columns of rows of tokens, as a factor of products."""
    valid = valid[:, None] & (column[None, :] < WIDTH)
    return operand(tl.load(x + places(token, stride, column, VEC), valid, 0.0), OPERAND, PRECISION)


@triton.jit
def _rows(
    x, token, stride, valid, OPERAND: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
    VEC: tl.constexpr, D: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Rows of tokens as factors of products, zero where they do not count."""
    rows = _tile(x, token, stride, tl.arange(0, D), valid, OPERAND, PRECISION, WIDTH, VEC)
    if TAIL:
        column = D + tl.arange(0, TAIL)
        rows_2 = _tile(x, token, stride, column, valid, OPERAND, PRECISION, WIDTH, VEC)
    else:
        rows_2 = rows
    return rows, rows_2


@triton.jit
def _store(
    x, token, stride, rows, rows_2, inside, WIDTH: tl.constexpr, VEC: tl.constexpr, D: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Write rows of tokens."""
    store_rows(x, token, stride, rows, tl.arange(0, D), inside, WIDTH, VEC)
    if TAIL:
        store_rows(x, token, stride, rows_2, D + tl.arange(0, TAIL), inside, WIDTH, VEC)


@triton.jit
def _products(x, x_2, y, y_2, PRECISION: tl.constexpr, TAIL: tl.constexpr):
    """Products of all rows of x with all rows of y."""
    product = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    if TAIL:
        product = tl.dot(x_2, tl.trans(y_2), product, input_precision=PRECISION)
    return product


@triton.jit
def _product(x, x_2, y, y_2, TAIL: tl.constexpr):
    """Products of rows of x with the same rows of y, in float32."""
    product = tl.sum(x.to(tl.float32) * y, 1)
    if TAIL:
        product += tl.sum(x_2.to(tl.float32) * y_2, 1)
    return product


@triton.jit
def _zeros(ROWS: tl.constexpr, D: tl.constexpr, TAIL: tl.constexpr):
    """Rows that products are added to."""
    return tl.zeros((ROWS, D), tl.float32), tl.zeros((ROWS, TAIL if TAIL else D), tl.float32)


@triton.jit
def _add(sums, sums_2, x, y, y_2, PRECISION: tl.constexpr, TAIL: tl.constexpr):
    """Sums and the product of x and y."""
    sums = tl.dot(x, y, sums, input_precision=PRECISION)
    if TAIL:
        sums_2 = tl.dot(x, y_2, sums_2, input_precision=PRECISION)
    return sums, sums_2


@triton.jit(do_not_specialize=["heads", "blocks", "tokens", "size", "key_size", "scale"])
def window_kernel(
    q, k, v, far, log_sums, out, log_den, mask, table, key_table,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, far_b, far_h, far_n, out_b, out_h, out_n, mask_b, mask_n,
    heads, blocks, tokens, size, key_size, scale,
    REST: tl.constexpr, MASK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    PLACE: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Output of queries, and the logarithm of its denominator."""
    b, h, block, first = _program(heads, blocks, size, ROWS)
    k += tl.multiple_of(b * k_b + h * k_h, VEC)
    v += tl.multiple_of(b * v_b + h * v_h, VEC)
    token, inside = _tokens(table, block, first + tl.arange(0, ROWS), size, PLACE)
    at = (b * heads + h) * tokens + token
    q += tl.multiple_of(b * q_b + h * q_h, VEC)
    queries, queries_2 = _rows(q, token, q_n, inside, OPERAND, PRECISION, WIDTH, VEC, D, TAIL)
    if REST:
        score = tl.load(log_sums + at, inside, 0.0) * _LOG2_E
        most = tl.maximum(score, _LEAST)
        total = tl.exp2(score - most)
        far += tl.multiple_of(b * far_b + h * far_h, VEC)
        sums, sums_2 = _rows(far, token, far_n, inside, tl.float32, "ieee", CHANNELS, VEC, DV, TAIL)
        sums, sums_2 = sums * total[:, None], sums_2 * total[:, None]
    else:
        most = tl.full((ROWS,), _LEAST, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        sums, sums_2 = _zeros(ROWS, DV, TAIL)
    for start in range(0, key_size, COLUMNS):
        key, seen = _tokens(key_table, block, start + tl.arange(0, COLUMNS), key_size, PLACE)
        seen = count_rows(mask, b, key, seen, mask_b, mask_n, MASK)
        keys, keys_2 = _rows(k, key, k_n, seen, OPERAND, PRECISION, WIDTH, VEC, D, TAIL)
        scores = _products(queries, queries_2, keys, keys_2, PRECISION, TAIL) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        less = tl.exp2(most - higher)
        total = total * less + tl.sum(weights, 1)
        values, values_2 = _rows(v, key, v_n, seen, OPERAND, PRECISION, CHANNELS, VEC, DV, TAIL)
        sums = sums * less[:, None]
        if TAIL:
            sums_2 = sums_2 * less[:, None]
        narrow = operand(weights, OPERAND, PRECISION)
        sums, sums_2 = _add(sums, sums_2, narrow, values, values_2, PRECISION, TAIL)
        most = higher
    total = tl.where(total == 0, 1.0, total)  # no key is seen
    out += tl.multiple_of(b * out_b + h * out_h, VEC)
    sums, sums_2 = sums / total[:, None], sums_2 / total[:, None]
    _store(out, token, out_n, sums, sums_2, inside, CHANNELS, VEC, DV, TAIL)
    tl.store(log_den + at, most + tl.log2(total), inside)


@triton.jit(do_not_specialize=["heads", "blocks", "tokens", "size", "key_size", "scale", "root"])
def window_queries_kernel(
    q, k, v, far, log_sums, grad, out, log_den, delta, dq, dfar, dlog_sums, mask, table, key_table,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, far_b, far_h, far_n, grad_b, grad_h, grad_n,
    out_b, out_h, out_n, dq_b, dq_h, dq_n, dfar_b, dfar_h, dfar_n, mask_b, mask_n,
    heads, blocks, tokens, size, key_size, scale, root,
    REST: tl.constexpr, MASK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    PLACE: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and of the rest, and ``delta``, products of each output and its gradient.

    Gradients of scores are differences from ``delta``, so that it is of the output in float32 and of the
    gradient as products have it: values with a mean would leave little of other differences.
    """
    b, h, block, first = _program(heads, blocks, size, ROWS)
    k += tl.multiple_of(b * k_b + h * k_h, VEC)
    v += tl.multiple_of(b * v_b + h * v_h, VEC)
    token, inside = _tokens(table, block, first + tl.arange(0, ROWS), size, PLACE)
    at = (b * heads + h) * tokens + token
    q += tl.multiple_of(b * q_b + h * q_h, VEC)
    queries, queries_2 = _rows(q, token, q_n, inside, OPERAND, PRECISION, WIDTH, VEC, D, TAIL)
    grad += tl.multiple_of(b * grad_b + h * grad_h, VEC)
    factor, factor_2 = _rows(grad, token, grad_n, inside, OPERAND, PRECISION, CHANNELS, VEC, DV, TAIL)
    out += tl.multiple_of(b * out_b + h * out_h, VEC)
    outs, outs_2 = _rows(out, token, out_n, inside, tl.float32, "ieee", CHANNELS, VEC, DV, TAIL)
    middle = _product(factor, factor_2, outs, outs_2, TAIL)
    tl.store(delta + at, middle, inside)
    level = tl.load(log_den + at, inside, 0.0)
    if REST:
        weight = tl.exp2(tl.load(log_sums + at, inside, 0.0) * _LOG2_E - level)
        far += tl.multiple_of(b * far_b + h * far_h, VEC)
        rows, rows_2 = _rows(far, token, far_n, inside, tl.float32, "ieee", CHANNELS, VEC, DV, TAIL)
        product = _product(factor, factor_2, rows, rows_2, TAIL)
        tl.store(dlog_sums + at, weight * (product - middle), inside)
        dfar += tl.multiple_of(b * dfar_b + h * dfar_h, VEC)
        rows, rows_2 = (factor.to(tl.float32) * weight[:, None], factor_2.to(tl.float32) * weight[:, None])
        _store(dfar, token, dfar_n, rows, rows_2, inside, CHANNELS, VEC, DV, TAIL)
    result, result_2 = _zeros(ROWS, D, TAIL)
    for start in range(0, key_size, COLUMNS):
        key, seen = _tokens(key_table, block, start + tl.arange(0, COLUMNS), key_size, PLACE)
        seen = count_rows(mask, b, key, seen, mask_b, mask_n, MASK)
        keys, keys_2 = _rows(k, key, k_n, seen, OPERAND, PRECISION, WIDTH, VEC, D, TAIL)
        values, values_2 = _rows(v, key, v_n, seen, OPERAND, PRECISION, CHANNELS, VEC, DV, TAIL)
        scores = _products(queries, queries_2, keys, keys_2, PRECISION, TAIL) * scale
        weights = tl.where(seen[None, :], tl.exp2(scores - level[:, None]), 0.0)
        slope = _products(factor, factor_2, values, values_2, PRECISION, TAIL)
        slope = operand(weights * (slope - middle[:, None]), OPERAND, PRECISION)
        result, result_2 = _add(result, result_2, slope, keys, keys_2, PRECISION, TAIL)
    dq += tl.multiple_of(b * dq_b + h * dq_h, VEC)
    _store(dq, token, dq_n, result * root, result_2 * root, inside, WIDTH, VEC, D, TAIL)


@triton.jit(do_not_specialize=["heads", "blocks", "tokens", "size", "key_size", "scale", "root"])
def window_keys_kernel(
    q, k, v, grad, log_den, delta, dk, dv, mask, table, key_table,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, grad_b, grad_h, grad_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    mask_b, mask_n, heads, blocks, tokens, size, key_size, scale, root,
    APART: tl.constexpr, MASK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    PLACE: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of a window: at their tokens or, APART, at their places."""
    b, h, block, first = _program(heads, blocks, key_size, ROWS)
    q += tl.multiple_of(b * q_b + h * q_h, VEC)
    grad += tl.multiple_of(b * grad_b + h * grad_h, VEC)
    slot = first + tl.arange(0, ROWS)
    key, there = _tokens(key_table, block, slot, key_size, PLACE)
    seen = count_rows(mask, b, key, there, mask_b, mask_n, MASK)
    k += tl.multiple_of(b * k_b + h * k_h, VEC)
    v += tl.multiple_of(b * v_b + h * v_h, VEC)
    keys, keys_2 = _rows(k, key, k_n, seen, OPERAND, PRECISION, WIDTH, VEC, D, TAIL)
    values, values_2 = _rows(v, key, v_n, seen, OPERAND, PRECISION, CHANNELS, VEC, DV, TAIL)
    key_grad, key_grad_2 = _zeros(ROWS, D, TAIL)
    value_grad, value_grad_2 = _zeros(ROWS, DV, TAIL)
    for start in range(0, size, COLUMNS):
        token, inside = _tokens(table, block, start + tl.arange(0, COLUMNS), size, PLACE)
        at = (b * heads + h) * tokens + token
        queries, queries_2 = _rows(q, token, q_n, inside, OPERAND, PRECISION, WIDTH, VEC, D, TAIL)
        level = tl.load(log_den + at, inside, 0.0)
        middle = tl.load(delta + at, inside, 0.0)
        scores = _products(keys, keys_2, queries, queries_2, PRECISION, TAIL) * scale
        weights = tl.exp2(scores - level[None, :])
        weights = tl.where(seen[:, None] & inside[None, :], weights, 0.0)
        factor, factor_2 = _rows(grad, token, grad_n, inside, OPERAND, PRECISION, CHANNELS, VEC, DV, TAIL)
        narrow = operand(weights, OPERAND, PRECISION)
        value_grad, value_grad_2 = _add(
            value_grad, value_grad_2, narrow, factor, factor_2, PRECISION, TAIL
        )  # fmt: skip
        slope = _products(values, values_2, factor, factor_2, PRECISION, TAIL)
        slope = operand(weights * (slope - middle[None, :]), OPERAND, PRECISION)
        key_grad, key_grad_2 = _add(key_grad, key_grad_2, slope, queries, queries_2, PRECISION, TAIL)
    if APART:
        key = block.to(PLACE) * key_size + slot
    dk += tl.multiple_of(b * dk_b + h * dk_h, VEC)
    dv += tl.multiple_of(b * dv_b + h * dv_h, VEC)
    _store(dk, key, dk_n, key_grad * root, key_grad_2 * root, there, WIDTH, VEC, D, TAIL)
    _store(dv, key, dv_n, value_grad, value_grad_2, there, CHANNELS, VEC, DV, TAIL)


@triton.jit(do_not_specialize=["heads", "tokens"])
def window_sum_kernel(
    parts, dx, table, parts_b, parts_h, parts_n, dx_b, dx_h, dx_n, heads, tokens,
    MOST: tl.constexpr, PLACE: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Gradient of each token: the sum over its places in windows, always in the same order."""
    b, h, _block, first = _program(heads, 1, tokens, ROWS)
    column = tl.arange(0, D)
    parts += tl.multiple_of(b * parts_b + h * parts_h, VEC)
    dx += tl.multiple_of(b * dx_b + h * dx_h, VEC)
    token = first + tl.arange(0, ROWS)
    inside = token < tokens
    total = tl.zeros((ROWS, D), tl.float32)
    for each in range(0, MOST):
        place = tl.load(table + token.to(PLACE) * MOST + each, inside, -1)
        at = tl.maximum(place, 0).to(PLACE)
        total += _tile(parts, at, parts_n, column, place >= 0, tl.float32, "ieee", WIDTH, VEC)
    store_rows(dx, token.to(PLACE), dx_n, total, column, inside, WIDTH, VEC)
