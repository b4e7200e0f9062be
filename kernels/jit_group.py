"""What a group of 16 tokens adds to one query vector or two, by kind of pool and by whether the memory is
asked for more meanwhile. The rest of a value that fills no wide step asks for nothing."""

from __future__ import annotations

from ellm.kernels.jit_ir import LANES, inline
from ellm.kernels.jit_pool import is_paired, padded_bytes, token_bytes
from ellm.kernels.jit_tile import (
    add_weighted_bf16,
    add_weighted_bf16_2,
    add_weighted_bf16_2_ahead,
    add_weighted_bf16_2_twice,
    add_weighted_bf16_2_twice_ahead,
    add_weighted_bf16_twice,
    add_weighted_f32,
    add_weighted_f32_4,
    add_weighted_f32_4_ahead,
    add_weighted_f32_4_twice,
    add_weighted_f32_4_twice_ahead,
    add_weighted_f32_twice,
    scores_bf16,
    scores_bf16_ahead,
    scores_bf16_twice,
    scores_bf16_twice_ahead,
    scores_f32,
    scores_f32_ahead,
    scores_f32_twice,
    scores_f32_twice_ahead,
)


@inline
def state_bytes(block):
    """Of a vector: running maximum, sums of weights, query, accumulator."""
    return 128 + 2 * padded_bytes(block)


@inline
def score_group(block, kind, query, keys, out, count, ahead, pace):
    """Scores of 16 keys for `count` queries, one or two."""
    gap, stride = state_bytes(block), token_bytes(block, kind)
    steps = stride // 64
    if is_paired(block, kind):
        if pace != 0 and count == 2:
            scores_bf16_twice_ahead(query, gap, keys, stride, steps, out, ahead, pace)
        elif pace != 0:
            scores_bf16_ahead(query, gap, keys, stride, steps, out, ahead, pace)
        elif count == 2:
            scores_bf16_twice(query, gap, keys, stride, steps, out)
        else:
            scores_bf16(query, gap, keys, stride, steps, out)
    elif pace != 0 and count == 2:
        scores_f32_twice_ahead(query, gap, keys, stride, steps, out, ahead, pace)
    elif pace != 0:
        scores_f32_ahead(query, gap, keys, stride, steps, out, ahead, pace)
    elif count == 2:
        scores_f32_twice(query, gap, keys, stride, steps, out)
    else:
        scores_f32(query, gap, keys, stride, steps, out)


@inline
def _add_group_bf16(block, weights, values, out, count, ahead, pace):
    stride, gap = padded_bytes(block) // 2, state_bytes(block)
    for at in range(0, stride - 127, 128):
        later = ahead + at // 64 * LANES * pace
        if pace != 0 and count == 2:
            add_weighted_bf16_2_twice_ahead(weights, values + at, stride, out + 2 * at, gap, later, pace)
        elif pace != 0:
            add_weighted_bf16_2_ahead(weights, values + at, stride, out + 2 * at, gap, later, pace)
        elif count == 2:
            add_weighted_bf16_2_twice(weights, values + at, stride, out + 2 * at, gap)
        else:
            add_weighted_bf16_2(weights, values + at, stride, out + 2 * at, gap)
    if stride % 128 != 0:
        at = stride - 64
        if count == 2:
            add_weighted_bf16_twice(weights, values + at, stride, out + 2 * at, gap)
        else:
            add_weighted_bf16(weights, values + at, stride, out + 2 * at, gap)


@inline
def _add_group_f32(block, weights, values, out, count, ahead, pace):
    stride, gap = padded_bytes(block), state_bytes(block)
    whole = stride // 256 * 256
    for at in range(0, whole, 256):
        later = ahead + at // 64 * LANES * pace
        if pace != 0 and count == 2:
            add_weighted_f32_4_twice_ahead(weights, values + at, stride, out + at, gap, later, pace)
        elif pace != 0:
            add_weighted_f32_4_ahead(weights, values + at, stride, out + at, gap, later, pace)
        elif count == 2:
            add_weighted_f32_4_twice(weights, values + at, stride, out + at, gap)
        else:
            add_weighted_f32_4(weights, values + at, stride, out + at, gap)
    for at in range(whole, stride, 64):
        if count == 2:
            add_weighted_f32_twice(weights, values + at, stride, out + at, gap)
        else:
            add_weighted_f32(weights, values + at, stride, out + at, gap)


@inline
def add_group(block, kind, weights, values, out, count, ahead, pace):
    """Add 16 weighted values to `count` accumulators, one or two."""
    if is_paired(block, kind):
        _add_group_bf16(block, weights, values, out, count, ahead, pace)
    else:
        _add_group_f32(block, weights, values, out, count, ahead, pace)
