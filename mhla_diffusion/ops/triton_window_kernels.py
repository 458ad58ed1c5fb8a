"""What :mod:`mhla_diffusion.ops.triton_window` launches: softmax of queries in a window, a tile at a time.

Each program works on a tile of queries of one block (or, ``keys``, of keys of one window) and goes through
the keys of the window (the queries of the block). Which tokens these are, two tables say, ``[M, places]``
with -1 where a place holds none. Programs that follow each other are heads of the same tokens.

Logarithms are of base 2: ``scale`` has log2(e) in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_pieces import count_rows, operand, places, store_rows

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
def _rows(
    x, token, stride, column, valid, OPERAND: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """Rows of tokens as a factor of products, zero where they do not count."""
    valid = valid[:, None] & (column[None, :] < WIDTH)
    rows = tl.load(x + places(token, stride, column, VEC), valid, 0.0)
    return operand(rows, OPERAND, PRECISION)


@triton.jit(do_not_specialize=["heads", "blocks", "tokens", "size", "key_size", "scale"])
def window_kernel(
    q, k, v, far, log_sums, out, log_den, mask, table, key_table,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, far_b, far_h, far_n, out_b, out_h, out_n, mask_b, mask_n,
    heads, blocks, tokens, size, key_size, scale,
    REST: tl.constexpr, MASK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    PLACE: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Output of queries, and the logarithm of its denominator."""
    b, h, block, first = _program(heads, blocks, size, ROWS)
    column, channel = tl.arange(0, D), tl.arange(0, DV)
    k += tl.multiple_of(b * k_b + h * k_h, VEC)
    v += tl.multiple_of(b * v_b + h * v_h, VEC)
    token, inside = _tokens(table, block, first + tl.arange(0, ROWS), size, PLACE)
    at = (b * heads + h) * tokens + token
    q += tl.multiple_of(b * q_b + h * q_h, VEC)
    queries = _rows(q, token, q_n, column, inside, OPERAND, PRECISION, WIDTH, VEC)
    if REST:
        score = tl.load(log_sums + at, inside, 0.0) * _LOG2_E
        most = tl.maximum(score, _LEAST)
        total = tl.exp2(score - most)
        far += tl.multiple_of(b * far_b + h * far_h, VEC)
        sums = _rows(far, token, far_n, channel, inside, tl.float32, "ieee", CHANNELS, VEC) * total[:, None]
    else:
        most = tl.full((ROWS,), _LEAST, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        sums = tl.zeros((ROWS, DV), tl.float32)
    for start in range(0, key_size, COLUMNS):
        key, seen = _tokens(key_table, block, start + tl.arange(0, COLUMNS), key_size, PLACE)
        seen = count_rows(mask, b, key, seen, mask_b, mask_n, MASK)
        keys = _rows(k, key, k_n, column, seen, OPERAND, PRECISION, WIDTH, VEC)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        less = tl.exp2(most - higher)
        total = total * less + tl.sum(weights, 1)
        values = _rows(v, key, v_n, channel, seen, OPERAND, PRECISION, CHANNELS, VEC)
        sums = sums * less[:, None]
        sums = tl.dot(operand(weights, OPERAND, PRECISION), values, sums, input_precision=PRECISION)
        most = higher
    total = tl.where(total == 0, 1.0, total)  # no key is seen
    out += tl.multiple_of(b * out_b + h * out_h, VEC)
    store_rows(out, token, out_n, sums / total[:, None], channel, inside, CHANNELS, VEC)
    tl.store(log_den + at, most + tl.log2(total), inside)


@triton.jit(do_not_specialize=["heads", "blocks", "tokens", "size", "key_size", "scale", "root"])
def window_queries_kernel(
    q, k, v, far, log_sums, grad, out, log_den, delta, dq, dfar, dlog_sums, mask, table, key_table,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, far_b, far_h, far_n, grad_b, grad_h, grad_n,
    out_b, out_h, out_n, dq_b, dq_h, dq_n, dfar_b, dfar_h, dfar_n, mask_b, mask_n,
    heads, blocks, tokens, size, key_size, scale, root,
    REST: tl.constexpr, MASK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    PLACE: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and of the rest, and ``delta``, products of each output and its gradient.

    Gradients of scores are differences from ``delta``, so that it is of the output in float32 and of the
    gradient as products have it: values with a mean would leave little of other differences.
    """
    b, h, block, first = _program(heads, blocks, size, ROWS)
    column, channel = tl.arange(0, D), tl.arange(0, DV)
    k += tl.multiple_of(b * k_b + h * k_h, VEC)
    v += tl.multiple_of(b * v_b + h * v_h, VEC)
    token, inside = _tokens(table, block, first + tl.arange(0, ROWS), size, PLACE)
    at = (b * heads + h) * tokens + token
    q += tl.multiple_of(b * q_b + h * q_h, VEC)
    queries = _rows(q, token, q_n, column, inside, OPERAND, PRECISION, WIDTH, VEC)
    grad += tl.multiple_of(b * grad_b + h * grad_h, VEC)
    factor = _rows(grad, token, grad_n, channel, inside, OPERAND, PRECISION, CHANNELS, VEC)
    out += tl.multiple_of(b * out_b + h * out_h, VEC)
    outs = _rows(out, token, out_n, channel, inside, tl.float32, "ieee", CHANNELS, VEC)
    middle = tl.sum(factor.to(tl.float32) * outs, 1)
    tl.store(delta + at, middle, inside)
    level = tl.load(log_den + at, inside, 0.0)
    if REST:
        weight = tl.exp2(tl.load(log_sums + at, inside, 0.0) * _LOG2_E - level)
        far += tl.multiple_of(b * far_b + h * far_h, VEC)
        rows = _rows(far, token, far_n, channel, inside, tl.float32, "ieee", CHANNELS, VEC)
        product = tl.sum(factor.to(tl.float32) * rows, 1)
        tl.store(dlog_sums + at, weight * (product - middle), inside)
        dfar += tl.multiple_of(b * dfar_b + h * dfar_h, VEC)
        rows = factor.to(tl.float32) * weight[:, None]
        store_rows(dfar, token, dfar_n, rows, channel, inside, CHANNELS, VEC)
    result = tl.zeros((ROWS, D), tl.float32)
    for start in range(0, key_size, COLUMNS):
        key, seen = _tokens(key_table, block, start + tl.arange(0, COLUMNS), key_size, PLACE)
        seen = count_rows(mask, b, key, seen, mask_b, mask_n, MASK)
        keys = _rows(k, key, k_n, column, seen, OPERAND, PRECISION, WIDTH, VEC)
        values = _rows(v, key, v_n, channel, seen, OPERAND, PRECISION, CHANNELS, VEC)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        weights = tl.where(seen[None, :], tl.exp2(scores - level[:, None]), 0.0)
        slope = tl.dot(factor, tl.trans(values), input_precision=PRECISION)
        slope = operand(weights * (slope - middle[:, None]), OPERAND, PRECISION)
        result = tl.dot(slope, keys, result, input_precision=PRECISION)
    dq += tl.multiple_of(b * dq_b + h * dq_h, VEC)
    store_rows(dq, token, dq_n, result * root, column, inside, WIDTH, VEC)


@triton.jit(do_not_specialize=["heads", "blocks", "tokens", "size", "key_size", "scale", "root"])
def window_keys_kernel(
    q, k, v, grad, log_den, delta, dk, dv, mask, table, key_table,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, grad_b, grad_h, grad_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    mask_b, mask_n, heads, blocks, tokens, size, key_size, scale, root,
    APART: tl.constexpr, MASK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    PLACE: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of a window: at their tokens or, APART, at their places."""
    b, h, block, first = _program(heads, blocks, key_size, ROWS)
    column, channel = tl.arange(0, D), tl.arange(0, DV)
    q += tl.multiple_of(b * q_b + h * q_h, VEC)
    grad += tl.multiple_of(b * grad_b + h * grad_h, VEC)
    slot = first + tl.arange(0, ROWS)
    key, there = _tokens(key_table, block, slot, key_size, PLACE)
    seen = count_rows(mask, b, key, there, mask_b, mask_n, MASK)
    k += tl.multiple_of(b * k_b + h * k_h, VEC)
    v += tl.multiple_of(b * v_b + h * v_h, VEC)
    keys = _rows(k, key, k_n, column, seen, OPERAND, PRECISION, WIDTH, VEC)
    values = _rows(v, key, v_n, channel, seen, OPERAND, PRECISION, CHANNELS, VEC)
    key_grad = tl.zeros((ROWS, D), tl.float32)
    value_grad = tl.zeros((ROWS, DV), tl.float32)
    for start in range(0, size, COLUMNS):
        token, inside = _tokens(table, block, start + tl.arange(0, COLUMNS), size, PLACE)
        at = (b * heads + h) * tokens + token
        queries = _rows(q, token, q_n, column, inside, OPERAND, PRECISION, WIDTH, VEC)
        level = tl.load(log_den + at, inside, 0.0)
        middle = tl.load(delta + at, inside, 0.0)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
        weights = tl.exp2(scores - level[None, :])
        weights = tl.where(seen[:, None] & inside[None, :], weights, 0.0)
        factor = _rows(grad, token, grad_n, channel, inside, OPERAND, PRECISION, CHANNELS, VEC)
        narrow = operand(weights, OPERAND, PRECISION)
        value_grad = tl.dot(narrow, factor, value_grad, input_precision=PRECISION)
        slope = tl.dot(values, tl.trans(factor), input_precision=PRECISION)
        slope = operand(weights * (slope - middle[None, :]), OPERAND, PRECISION)
        key_grad = tl.dot(slope, queries, key_grad, input_precision=PRECISION)
    if APART:
        key = block.to(PLACE) * key_size + slot
    dk += tl.multiple_of(b * dk_b + h * dk_h, VEC)
    dv += tl.multiple_of(b * dv_b + h * dv_h, VEC)
    store_rows(dk, key, dk_n, key_grad * root, column, there, WIDTH, VEC)
    store_rows(dv, key, dv_n, value_grad, channel, there, CHANNELS, VEC)


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
        total += _rows(parts, at, parts_n, column, place >= 0, tl.float32, "ieee", WIDTH, VEC)
    store_rows(dx, token.to(PLACE), dx_n, total, column, inside, WIDTH, VEC)
