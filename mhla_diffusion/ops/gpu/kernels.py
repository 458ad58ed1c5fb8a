"""What :mod:`mhla_diffusion.ops.gpu.mhla` launches: one axis of programs, each on tokens of one block.

A program finds its tokens in ``order`` (tokens sorted by block, ``[N]``) between ``starts[block]`` and
``starts[block + 1]``; long blocks are shared by several programs (parts). Programs that follow each other are
heads of the same tokens: neighbours in memory, with the same order and angles.

Names: x is q or k, ``[B, H, N, WIDTH]``; v the other factor, ``[B, H, N, CHANNELS]``; both with channels
side by side. A summary is ``[CHANNELS, WIDTH]``, the sum of features beside it ``[WIDTH]``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import (
    count_rows,
    fold,
    inverse_rms,
    load_angles,
    load_borders,
    load_factor,
    load_features,
    load_matrix,
    load_middle,
    load_rows,
    load_values,
    not_zero,
    operand,
    outputs_of,
    part_of_block,
    phi,
    phi_backward,
    put_beside,
    store_rows,
    store_summary,
    sum_beside,
    sum_of_squares,
    turn,
    write,
    write_gradient,
)
from .weights import weights_grad_kernel as weights_grad_kernel
from .weights import weights_kernel as weights_kernel
from .window_kernels import window_kernel as window_kernel
from .window_kernels import window_keys_kernel as window_keys_kernel
from .window_kernels import window_queries_kernel as window_queries_kernel
from .window_kernels import window_sum_kernel as window_sum_kernel


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
        counts = count_rows(mask, b, token, token < tokens, mask_b, mask_n, MASK)
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


@triton.jit(do_not_specialize=["heads", "blocks", "parts", "tokens", "eps", "norm_eps"])
def outer_kernel(
    x, v, summaries, sums, centre, den, den_grad, order, starts, rotary, mask, norm,
    x_b, x_h, x_n, v_b, v_h, v_n, r_b, r_h, r_n, mask_b, mask_n, summary_stride, sums_stride,
    heads, blocks, parts, tokens, eps, norm_eps,
    QUOTIENT: tl.constexpr, NORMALIZED: tl.constexpr, CENTRED: tl.constexpr, FEATURE_MAP: tl.constexpr,
    NORM: tl.constexpr, ROTARY: tl.constexpr, MASK: tl.constexpr, OPERAND: tl.constexpr, PLACE: tl.constexpr,
    PRECISION: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, X_VEC: tl.constexpr,
    V_VEC: tl.constexpr, ROWS: tl.constexpr, KEPT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    TILES: tl.constexpr, TAIL: tl.constexpr, TAIL_V: tl.constexpr, FREE: tl.constexpr,
):  # fmt: skip
    """Summaries of values and features of x, and the sums of features.

    NORM: of x behind its norm. CENTRED: of ``v - centre``. QUOTIENT: of ``v / den``, and of features times
    ``den_grad``. Where there is a second tile of channels, ones (or ``den_grad``) are put into it, at FREE:
    their products are the sums.
    """
    b, h, tile, block, part, first, last = part_of_block(starts, heads, blocks, parts, TILES, ROWS)
    column, channel = tl.arange(0, D), tile * DV + tl.arange(0, DV)
    head = b * heads + h
    x += tl.multiple_of(b * x_b + h * x_h, X_VEC)
    v += tl.multiple_of(b * v_b + h * v_h, V_VEC)
    if ROTARY:
        rotary += b * r_b + h * r_h
    if QUOTIENT:
        den += head * tokens
        den_grad += head * tokens
    middle = load_middle(centre, head, channel, CENTRED, CHANNELS)
    total = tl.zeros((DV, D), tl.float32)
    if TAIL_V:
        channel_2 = DV * TILES + tl.arange(0, TAIL_V)
        middle_2 = load_middle(centre, head, channel_2, CENTRED, CHANNELS)
        one = tl.full((1, 1), 1.0, tl.float32).to(OPERAND)
        total_v = tl.zeros((D, TAIL_V), tl.float32)
    elif NORMALIZED:
        features = tl.zeros((KEPT, D), tl.float32)
    if TAIL:
        column_2 = D + tl.arange(0, TAIL)
        total_x = tl.zeros((DV, TAIL), tl.float32)
        corner = tl.zeros((TAIL, TAIL_V), tl.float32)
    slot = first + tl.arange(0, ROWS)
    following = tl.load(order + slot, slot < last, 0)  # a step ahead, as what is loaded next depends on it
    for row in range(first, last, ROWS):
        slot = row + tl.arange(0, ROWS)
        inside = slot < last
        token = following.to(PLACE)
        following = tl.load(order + slot + ROWS, slot + ROWS < last, 0)
        counts = count_rows(mask, b, token, inside, mask_b, mask_n, MASK)
        root = None
        if NORM:
            root = inverse_rms(x, token, x_n, counts, norm_eps, WIDTH, X_VEC, D, TAIL)
        plain, turned = load_features(
            x, x_n, rotary, r_n, token, counts, column, eps, norm, root, True, FEATURE_MAP, NORM, ROTARY,
            OPERAND, PRECISION, WIDTH, X_VEC, ROWS, D,
        )  # fmt: skip
        factor = load_factor(
            v, v_n, den, middle, token, counts, channel, QUOTIENT, CENTRED, OPERAND, PRECISION, CHANNELS,
            V_VEC,
        )  # fmt: skip
        total = tl.dot(tl.trans(factor), turned, total, input_precision=PRECISION)
        if TAIL_V:
            factor_2 = tl.zeros((ROWS, TAIL_V), tl.float32).to(OPERAND)
            if TAIL:
                factor_2 = load_factor(
                    v, v_n, den, middle_2, token, counts, channel_2, QUOTIENT, CENTRED, OPERAND, PRECISION,
                    CHANNELS, V_VEC,
                )  # fmt: skip
            if QUOTIENT:
                weight = tl.load(den_grad + token, inside, 0.0)[:, None]
                factor_2 = put_beside(factor_2, weight, channel_2[None, :], FREE)
            elif NORMALIZED:
                factor_2 = tl.where(channel_2[None, :] == FREE, one, factor_2)
            total_v = tl.dot(tl.trans(turned), factor_2, total_v)
        elif QUOTIENT:
            weight = tl.load(den_grad + token, inside, 0.0)[:, None]
            features += fold(plain.to(tl.float32) * weight, ROWS, KEPT, D)
        elif NORMALIZED:
            features += fold(plain.to(tl.float32), ROWS, KEPT, D)
        if TAIL:
            _, turned_2 = load_features(
                x, x_n, rotary, r_n, token, counts, column_2, eps, norm, root, True, FEATURE_MAP, NORM,
                ROTARY, OPERAND, PRECISION, WIDTH, X_VEC, ROWS, TAIL,
            )  # fmt: skip
            total_x = tl.dot(tl.trans(factor), turned_2, total_x)
            corner = tl.dot(tl.trans(turned_2), factor_2, corner)
    at = (head * blocks + block) * parts + part
    store_summary(summaries, at, summary_stride, total, channel, column, CHANNELS, WIDTH)
    if TAIL:
        store_summary(summaries, at, summary_stride, total_x, channel, column_2, CHANNELS, WIDTH)
        store_summary(summaries, at, summary_stride, tl.trans(total_v), channel_2, column, CHANNELS, WIDTH)
        store_summary(summaries, at, summary_stride, tl.trans(corner), channel_2, column_2, CHANNELS, WIDTH)
    if NORMALIZED and tile == 0:
        sums += at * sums_stride
        if TAIL_V:
            tl.store(sums + column, sum_beside(total_v, channel_2, FREE), column < WIDTH)
        else:
            tl.store(sums + column, tl.sum(features, 0), column < WIDTH)
        if TAIL:
            tl.store(sums + column_2, sum_beside(corner, channel_2, FREE), column_2 < WIDTH)


@triton.jit(do_not_specialize=["heads", "blocks", "parts", "tokens", "eps", "norm_eps"])
def inner_kernel(
    x, v, summaries, sums, centre, den, order, starts, rotary, norm, out_norm, gate,
    x_b, x_h, x_n, v_b, v_h, v_n, r_b, r_h, r_n, gate_b, gate_h, gate_n, summary_stride, sums_stride,
    heads, blocks, parts, tokens, eps, norm_eps,
    NORMALIZED: tl.constexpr, CENTRED: tl.constexpr, SATURATE: tl.constexpr, FEATURE_MAP: tl.constexpr,
    NORM: tl.constexpr, OUT_NORM: tl.constexpr, GATE: tl.constexpr, ROTARY: tl.constexpr,
    OPERAND: tl.constexpr, PLACE: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, X_VEC: tl.constexpr, V_VEC: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, TILES: tl.constexpr, TAIL: tl.constexpr, TAIL_V: tl.constexpr, FREE: tl.constexpr,
):  # fmt: skip
    """Write to v products of features of x and summaries; over the denominators, which are stored too.

    NORM: of x behind its norm. OUT_NORM, which sees whole rows: TILES is 1. GATE: times ``SiLU(gate)``.
    Where there is a second tile of channels, the sums are put into it, from FREE on: their products are the
    denominators.
    """
    b, h, tile, block, _part, first, last = part_of_block(starts, heads, blocks, parts, TILES, ROWS)
    column, channel = tl.arange(0, D), tile * DV + tl.arange(0, DV)
    head = b * heads + h
    x += tl.multiple_of(b * x_b + h * x_h, X_VEC)
    v += tl.multiple_of(b * v_b + h * v_h, V_VEC)
    if ROTARY:
        rotary += b * r_b + h * r_h
    if GATE:
        gate += tl.multiple_of(b * gate_b + h * gate_h, V_VEC)
    at = head * blocks + block
    matrix = load_matrix(summaries, at, summary_stride, channel, column, CHANNELS, WIDTH, OPERAND, PRECISION)
    middle = load_middle(centre, head, channel, CENTRED, CHANNELS)
    if NORMALIZED:
        den += head * tokens
        sums += at * sums_stride
        z = tl.load(sums + column, column < WIDTH, 0.0)
    if TAIL_V:
        channel_2 = DV * TILES + tl.arange(0, TAIL_V)
        middle_2 = load_middle(centre, head, channel_2, CENTRED, CHANNELS)
        matrix_v = load_matrix(
            summaries, at, summary_stride, channel_2, column, CHANNELS, WIDTH, OPERAND, PRECISION
        )
        if NORMALIZED:
            matrix_v = put_beside(matrix_v, z[None, :], channel_2[:, None], FREE)
    if TAIL:
        column_2 = D + tl.arange(0, TAIL)
        matrix_x = load_matrix(
            summaries, at, summary_stride, channel, column_2, CHANNELS, WIDTH, OPERAND, PRECISION
        )
        corner = load_matrix(
            summaries, at, summary_stride, channel_2, column_2, CHANNELS, WIDTH, OPERAND, PRECISION
        )
        if NORMALIZED:
            z_2 = tl.load(sums + column_2, column_2 < WIDTH, 0.0)
            corner = put_beside(corner, z_2[None, :], channel_2[:, None], FREE)
    slot = first + tl.arange(0, ROWS)
    following = tl.load(order + slot, slot < last, 0)  # a step ahead, as what is loaded next depends on it
    for row in range(first, last, ROWS):
        slot = row + tl.arange(0, ROWS)
        inside = slot < last
        token = following.to(PLACE)
        following = tl.load(order + slot + ROWS, slot + ROWS < last, 0)
        root = None
        if NORM:
            root = inverse_rms(x, token, x_n, inside, norm_eps, WIDTH, X_VEC, D, TAIL)
        plain, turned = load_features(
            x, x_n, rotary, r_n, token, inside, column, eps, norm, root, False, FEATURE_MAP, NORM, ROTARY,
            OPERAND, PRECISION, WIDTH, X_VEC, ROWS, D,
        )  # fmt: skip
        product = tl.dot(turned, tl.trans(matrix), input_precision=PRECISION)
        if TAIL_V:
            product_2 = tl.dot(turned, tl.trans(matrix_v))
        if TAIL:
            _, turned_2 = load_features(
                x, x_n, rotary, r_n, token, inside, column_2, eps, norm, root, False, FEATURE_MAP, NORM,
                ROTARY, OPERAND, PRECISION, WIDTH, X_VEC, ROWS, TAIL,
            )  # fmt: skip
            product = tl.dot(turned_2, tl.trans(matrix_x), product)
            product_2 = tl.dot(turned_2, tl.trans(corner), product_2)
        seen, inverse = None, None
        if NORMALIZED:
            if TAIL_V:
                denominator = sum_beside(product_2, channel_2, FREE)
            else:
                denominator = tl.sum(plain.to(tl.float32) * z[None, :], 1)
            if tile == 0:
                tl.store(den + token, denominator, inside)
            seen = tl.where(denominator == 0, 0.0, 1.0)
            inverse = 1.0 / not_zero(denominator)
        product = outputs_of(product, inverse, seen, middle, NORMALIZED, CENTRED)
        if TAIL:
            product_2 = outputs_of(product_2, inverse, seen, middle_2, NORMALIZED, CENTRED)
        root = None
        if OUT_NORM:
            squares = sum_of_squares(product, channel, CHANNELS)
            if TAIL:
                squares += sum_of_squares(product_2, channel_2, CHANNELS)
            root = tl.rsqrt(squares / CHANNELS + norm_eps)
        write(
            v, v_n, product, token, inside, channel, out_norm, root, gate, gate_n, OUT_NORM, GATE, SATURATE,
            CHANNELS, V_VEC,
        )  # fmt: skip
        if TAIL:
            write(
                v, v_n, product_2, token, inside, channel_2, out_norm, root, gate, gate_n, OUT_NORM, GATE,
                SATURATE, CHANNELS, V_VEC,
            )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "blocks", "parts", "tokens", "eps"])
def queries_kernel(
    x, v, dx, summaries, sums, matrix_grads, sum_grads, den, den_grad, own_grad, order, starts, rotary,
    x_b, x_h, x_n, v_b, v_h, v_n, dx_b, dx_h, dx_n, r_b, r_h, r_n, summary_stride, sums_stride,
    heads, blocks, parts, tokens, eps,
    FUSED: tl.constexpr, SUMS: tl.constexpr, NORMALIZED: tl.constexpr, FEATURE_MAP: tl.constexpr,
    ROTARY: tl.constexpr, OPERAND: tl.constexpr, PLACE: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, X_VEC: tl.constexpr, V_VEC: tl.constexpr,
    ROWS: tl.constexpr, KEPT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, TILES: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Gradient of queries x, where v is the gradient g of the output, and, FUSED, of their summaries S.

    NORMALIZED: the output is ``o = n / den``. With ``u = S^T g / den`` the features f get
    ``u - (f . u / den) z``: g . o is f . u, so that no o is read, and what is left is orthogonal to f.
    SUMS: den has a gradient of its own too, ``own_grad``.
    Where ``outer`` is to find the gradient of S, that of den is stored for it.
    """
    b, h, _tile, block, part, first, last = part_of_block(starts, heads, blocks, parts, 1, ROWS)
    column, all_channels = tl.arange(0, D), tl.arange(0, DV)
    x += tl.multiple_of(b * x_b + h * x_h, X_VEC)
    v += tl.multiple_of(b * v_b + h * v_h, V_VEC)
    dx += tl.multiple_of(b * dx_b + h * dx_h, X_VEC)
    head = b * heads + h
    at = head * blocks + block
    if ROTARY:
        rotary += b * r_b + h * r_h
    if NORMALIZED:
        sums += at * sums_stride
        den += head * tokens
        if SUMS:
            own_grad += head * tokens
        z = tl.load(sums + column, column < WIDTH, 0.0)
    if TILES == 1:
        matrix = load_matrix(
            summaries, at, summary_stride, all_channels, column, CHANNELS, WIDTH, OPERAND, PRECISION
        )
    if TAIL:
        column_2, channel_2 = D + tl.arange(0, TAIL), DV + tl.arange(0, TAIL)
        matrix_x, matrix_v, corner = load_borders(
            summaries, at, summary_stride, all_channels, column, channel_2, column_2, CHANNELS, WIDTH,
            OPERAND, PRECISION,
        )  # fmt: skip
        if NORMALIZED:
            z_2 = tl.load(sums + column_2, column_2 < WIDTH, 0.0)
    if FUSED:
        total = tl.zeros((DV, D), tl.float32)
        weighted = tl.zeros((KEPT, D), tl.float32)
    slot = first + tl.arange(0, ROWS)
    following = tl.load(order + slot, slot < last, 0)  # a step ahead, as what is loaded next depends on it
    for row in range(first, last, ROWS):
        slot = row + tl.arange(0, ROWS)
        inside = slot < last
        token = following.to(PLACE)
        following = tl.load(order + slot + ROWS, slot + ROWS < last, 0)
        real = inside[:, None] & (column[None, :] < WIDTH)
        if TILES == 1:
            values = load_values(v, token, v_n, all_channels, inside, OPERAND, CHANNELS, V_VEC)
            factor = operand(values, OPERAND, PRECISION)
            plain = tl.dot(factor, matrix, input_precision=PRECISION)
        else:
            plain = tl.zeros((ROWS, D), tl.float32)
            for tile in range(0, TILES):  # not unrolled, or all tiles would be held at once
                channel = tile * DV + all_channels
                matrix = load_matrix(
                    summaries, at, summary_stride, channel, column, CHANNELS, WIDTH, OPERAND, PRECISION
                )
                values = load_values(v, token, v_n, channel, inside, OPERAND, CHANNELS, V_VEC)
                factor = operand(values, OPERAND, PRECISION)
                plain = tl.dot(factor, matrix, plain, input_precision=PRECISION)
        if TAIL:
            values = load_values(v, token, v_n, channel_2, inside, OPERAND, CHANNELS, V_VEC)
            plain = tl.dot(values, matrix_v, plain)
            plain_2 = tl.dot(factor, matrix_x)
            plain_2 = tl.dot(values, corner, plain_2)
            rows_2 = load_rows(x, token, x_n, column_2, inside, FEATURE_MAP, OPERAND, WIDTH, X_VEC)
            features_2 = phi(rows_2, column_2, inside, eps, False, WIDTH, TAIL, FEATURE_MAP).to(tl.float32)
        if ROTARY:
            cos, sin = load_angles(rotary, token, r_n, column, real, ROWS, D)
            plain = turn(plain, cos, -sin, ROWS, D)
        rows = load_rows(x, token, x_n, column, inside, FEATURE_MAP, OPERAND, WIDTH, X_VEC)
        features = phi(rows, column, inside, eps, False, WIDTH, D, FEATURE_MAP).to(tl.float32)
        if NORMALIZED:
            inverse = 1.0 / not_zero(tl.load(den + token, inside, 1.0))
            plain = plain * inverse[:, None]
            weight = tl.sum(features * plain, 1)
            if TAIL:
                plain_2 = plain_2 * inverse[:, None]
                weight += tl.sum(features_2 * plain_2, 1)
            weight = -weight * inverse
            if SUMS:
                weight += tl.load(own_grad + token, inside, 0.0)
            plain += weight[:, None] * z[None, :]
            if TAIL:
                plain_2 += weight[:, None] * z_2[None, :]
            if FUSED:
                weighted += fold(features * weight[:, None], ROWS, KEPT, D)
            else:
                tl.store(den_grad + head * tokens + token, weight, inside)
        result = phi_backward(plain, rows, features, FEATURE_MAP)
        store_rows(dx, token, dx_n, result, column, inside, WIDTH, X_VEC)
        if TAIL:
            result = phi_backward(plain_2, rows_2, features_2, FEATURE_MAP)
            store_rows(dx, token, dx_n, result, column_2, inside, WIDTH, X_VEC)
        if FUSED:
            if ROTARY:
                features = turn(features, cos, sin, ROWS, D)
            if NORMALIZED:
                features = features * inverse[:, None]
            turned = operand(features, OPERAND, PRECISION)
            total = tl.dot(tl.trans(factor), turned, total, input_precision=PRECISION)
    if FUSED:
        at = at * parts + part
        store_summary(matrix_grads, at, summary_stride, total, all_channels, column, CHANNELS, WIDTH)
        if NORMALIZED:
            tl.store(sum_grads + at * sums_stride + column, tl.sum(weighted, 0), column < WIDTH)


@triton.jit(do_not_specialize=["heads", "blocks", "parts", "eps"])
def keys_kernel(
    x, v, dx, dv, summaries, sums, centre, order, starts, rotary, mask,
    x_b, x_h, x_n, v_b, v_h, v_n, dx_b, dx_h, dx_n, dv_b, dv_h, dv_n, r_b, r_h, r_n, mask_b, mask_n,
    summary_stride, sums_stride, heads, blocks, parts, eps,
    NORMALIZED: tl.constexpr, CENTRED: tl.constexpr, FEATURE_MAP: tl.constexpr, ROTARY: tl.constexpr,
    MASK: tl.constexpr, OPERAND: tl.constexpr, PLACE: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, X_VEC: tl.constexpr, V_VEC: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, TILES: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Gradients of keys x and values v, from those of their summaries.

    What the second product needs is computed, or read from a cache, after the first is done, so that
    registers hold one of them at a time.
    """
    b, h, _tile, block, _part, first, last = part_of_block(starts, heads, blocks, parts, 1, ROWS)
    column, all_channels = tl.arange(0, D), tl.arange(0, DV)
    x += tl.multiple_of(b * x_b + h * x_h, X_VEC)
    v += tl.multiple_of(b * v_b + h * v_h, V_VEC)
    dx += tl.multiple_of(b * dx_b + h * dx_h, X_VEC)
    dv += tl.multiple_of(b * dv_b + h * dv_h, V_VEC)
    head = b * heads + h
    at = head * blocks + block
    if ROTARY:
        rotary += b * r_b + h * r_h
    if NORMALIZED:
        sums += at * sums_stride
    if TILES == 1:
        matrix = load_matrix(
            summaries, at, summary_stride, all_channels, column, CHANNELS, WIDTH, OPERAND, PRECISION
        )
    if CENTRED:  # (v - m) S = v S - m S, which leaves v in few digits, as it is
        z = tl.load(sums + column, column < WIDTH, 0.0)
        for tile in range(0, TILES):
            channel = tile * DV + all_channels
            if TILES > 1:
                matrix = load_matrix(
                    summaries, at, summary_stride, channel, column, CHANNELS, WIDTH, OPERAND, PRECISION
                )
            middle = load_middle(centre, head, channel, CENTRED, CHANNELS)
            z -= tl.sum(middle[:, None] * matrix.to(tl.float32), 0)
    if TAIL:
        column_2, channel_2 = D + tl.arange(0, TAIL), DV + tl.arange(0, TAIL)
        matrix_x, matrix_v, corner = load_borders(
            summaries, at, summary_stride, all_channels, column, channel_2, column_2, CHANNELS, WIDTH,
            OPERAND, PRECISION,
        )  # fmt: skip
        if NORMALIZED:
            z_2 = tl.load(sums + column_2, column_2 < WIDTH, 0.0)
        if CENTRED:
            middle_1 = load_middle(centre, head, all_channels, CENTRED, CHANNELS)[:, None]
            middle_2 = load_middle(centre, head, channel_2, CENTRED, CHANNELS)[:, None]
            z -= tl.sum(middle_2 * matrix_v.to(tl.float32), 0)
            z_2 -= tl.sum(middle_1 * matrix_x.to(tl.float32), 0)
            z_2 -= tl.sum(middle_2 * corner.to(tl.float32), 0)
    slot = first + tl.arange(0, ROWS)
    following = tl.load(order + slot, slot < last, 0)  # a step ahead, as what is loaded next depends on it
    for row in range(first, last, ROWS):
        slot = row + tl.arange(0, ROWS)
        inside = slot < last
        token = following.to(PLACE)
        following = tl.load(order + slot + ROWS, slot + ROWS < last, 0)
        counts = count_rows(mask, b, token, inside, mask_b, mask_n, MASK)
        real = inside[:, None] & (column[None, :] < WIDTH)
        if TILES == 1:
            values = operand(
                load_values(v, token, v_n, all_channels, counts, OPERAND, CHANNELS, V_VEC), OPERAND, PRECISION
            )
            plain = tl.dot(values, matrix, input_precision=PRECISION)
        else:
            plain = tl.zeros((ROWS, D), tl.float32)
            for tile in range(0, TILES):  # not unrolled, or all tiles would be held at once
                channel = tile * DV + all_channels
                matrix = load_matrix(
                    summaries, at, summary_stride, channel, column, CHANNELS, WIDTH, OPERAND, PRECISION
                )
                values = load_values(v, token, v_n, channel, counts, OPERAND, CHANNELS, V_VEC)
                plain = tl.dot(operand(values, OPERAND, PRECISION), matrix, plain, input_precision=PRECISION)
        if TAIL:
            values_2 = load_values(v, token, v_n, channel_2, counts, OPERAND, CHANNELS, V_VEC)
            plain = tl.dot(values_2, matrix_v, plain)
            plain_2 = tl.dot(values, matrix_x)
            plain_2 = tl.dot(values_2, corner, plain_2)
        if ROTARY:
            cos, sin = load_angles(rotary, token, r_n, column, real, ROWS, D)
            plain = turn(plain, cos, -sin, ROWS, D)
        if NORMALIZED:
            if not CENTRED:
                z = tl.load(sums + column, column < WIDTH, 0.0)
            plain += z[None, :]
        features = write_gradient(
            dx, dx_n, plain, x, x_n, token, inside, counts, column, eps, MASK, FEATURE_MAP, OPERAND, WIDTH,
            X_VEC, D,
        )  # fmt: skip
        if ROTARY:
            cos, sin = load_angles(rotary, token, r_n, column, real, ROWS, D)
            features = turn(features, cos, sin, ROWS, D)
        turned = operand(features, OPERAND, PRECISION)
        if TAIL:
            if NORMALIZED:
                plain_2 += z_2[None, :]
            turned_2 = write_gradient(
                dx, dx_n, plain_2, x, x_n, token, inside, counts, column_2, eps, MASK, FEATURE_MAP, OPERAND,
                WIDTH, X_VEC, TAIL,
            ).to(OPERAND)  # fmt: skip
            product_2 = tl.dot(turned, tl.trans(matrix_v))
            product_2 = tl.dot(turned_2, tl.trans(corner), product_2)
            store_rows(dv, token, dv_n, product_2, channel_2, inside, CHANNELS, V_VEC)
        for tile in range(0, TILES):
            channel = tile * DV + all_channels
            if TILES > 1:
                matrix = load_matrix(
                    summaries, at, summary_stride, channel, column, CHANNELS, WIDTH, OPERAND, PRECISION
                )
            product = tl.dot(turned, tl.trans(matrix), input_precision=PRECISION)
            if TAIL:
                product = tl.dot(turned_2, tl.trans(matrix_x), product)
            store_rows(dv, token, dv_n, product, channel, inside, CHANNELS, V_VEC)
