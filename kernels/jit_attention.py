"""Paged causal attention without a gather: decode rows and prefill rows by the same arithmetic.

A unit of work is a few rows of one entry and the query heads that share one key/value head: each key/value
tile is read once for all of them. One row of one head walks the tiles of 64 tokens from fixed absolute
positions in order (online softmax, base 2): its result depends on its position, its query and the pool alone,
not on what is computed beside it, so a prefill chunk and a decode step give the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ellm.kernels.jit_group import add_group, score_group, state_bytes
from ellm.kernels.jit_ir import LANES, inline, merge
from ellm.kernels.jit_launch import Kernel
from ellm.kernels.jit_math import exp2
from ellm.kernels.jit_memory import (
    fetch_add,
    item_size,
    load_f32,
    load_float,
    load_i32,
    load_i64,
    load_part,
    store_f32,
    store_float,
    store_part,
    word,
)
from ellm.kernels.jit_pool import (
    DIM,
    GROUP,
    GROUPS,
    K_POOL,
    K_TOKEN,
    KV_HEADS,
    OUT,
    POSITIONS,
    Q_HEAD,
    Q_ROW,
    RUNS,
    SCALE,
    SCRATCH,
    SCRATCH_BYTES,
    STATES_AT,
    TABLE_ROW,
    TABLES,
    UNITS,
    V_POOL,
    WEIGHTS_AT,
    WINDOW,
    Q,
    ahead_of,
    find_groups,
    is_paired,
    padded_bytes,
    token_bytes,
)
from ellm.kernels.jit_tile import TILE, TILE_BYTES, split_bf16, store_interleaved_bf16
from ellm.kernels.jit_vector import float_from_bits, keep_lanes, larger, peak, spread, total

NEG_INF = np.float32(-np.inf)


@inline
def _load_query(block, kind, row, head, state):
    dim = word(block, DIM)
    size = item_size(kind)
    scale = float_from_bits(word(block, SCALE))
    source = word(block, Q) + row * word(block, Q_ROW) + head * word(block, Q_HEAD)
    store_float(state, NEG_INF)
    store_f32(state + 64, spread(np.float32(0.0)))
    query = state + 128
    if is_paired(block, kind):
        for i in range(0, dim, 2 * LANES):
            split_bf16(query + 4 * i, source + i * size, scale)
    else:
        for i in range(0, dim, LANES):
            store_f32(query + 4 * i, load_part(kind, source + i * size, dim - i) * spread(scale))
    for i in range(0, padded_bytes(block), 64):
        store_f32(query + padded_bytes(block) + i, spread(np.float32(0.0)))


@inline
def _weigh(block, state, weights, base, first, last):
    """Turn a vector's scores of the tile at `base` into weights, and scale what it has to the new maximum."""
    begin, end = _groups(base, first, last)
    old = load_float(state)
    top = spread(old)
    for group in range(begin, end):
        start = base + group * LANES
        score = load_f32(weights + 64 * group)
        if start < first or start + LANES > last:
            score = keep_lanes(score, first - start, last - start, NEG_INF)
            store_f32(weights + 64 * group, score)
        top = larger(score, top)
    new = peak(top)
    decay = exp2(spread(old) - spread(new))
    sums = load_f32(state + 64) * decay
    for group in range(begin, end):
        weight = exp2(load_f32(weights + 64 * group) - spread(new))
        store_f32(weights + 64 * group, weight)
        sums = sums + weight
    store_f32(state + 64, sums)
    if new > old:
        store_float(state, new)
        accumulator = state + 128 + padded_bytes(block)
        for i in range(0, padded_bytes(block), 64):
            store_f32(accumulator + i, load_f32(accumulator + i) * decay)


@inline
def _groups(base, first, last):
    """The groups of the tile at `base` that hold some of the tokens [first, last)."""
    return max(0, first - base) // LANES, min(GROUPS, (last - base + LANES - 1) // LANES)


@inline
def _attend(block, kind, scratch, state, count, span, ahead, part):
    """`count` vectors, one or two, of one row over `span`: the tokens [first, last) of the tile at `base`.

    Meanwhile the memory is asked for a `part` of what follows each of these groups (`ahead_of`), in as many
    parts as a row takes for its query heads. A chunk's first row in the tile asks, the others have arithmetic
    enough to wait beside."""
    base, first, last = span
    begin, end = _groups(base, first, last)
    weights = scratch + WEIGHTS_AT
    parts = (word(block, GROUP) + 1) // 2
    stride = word(block, K_TOKEN)  # of the pool, which may be narrower than what is read
    pace = 64 * stride // token_bytes(block, kind) // parts if part < parts else 0
    skip = LANES * stride * part // parts
    later = 0
    for group in range(begin, end):
        keys = load_i64(scratch + 8 * group)
        if pace != 0:
            later = ahead_of(block, K_POOL, ahead, base + group * LANES, keys) + skip
        score_group(block, kind, state + 128, keys, weights + 64 * group, count, later, pace)
    for i in range(count):
        _weigh(block, state + i * state_bytes(block), weights + i * TILE_BYTES, base, first, last)
    accumulator = state + 128 + padded_bytes(block)
    for group in range(begin, end):
        values = load_i64(scratch + 8 * (GROUPS + group))
        if pace != 0:
            later = ahead_of(block, V_POOL, ahead, base + group * LANES, values) + skip
        add_group(block, kind, weights + 64 * group, values, accumulator, count, later, pace)


@inline
def _finish(block, kind, row, head, state):
    dim = word(block, DIM)
    size = item_size(kind)
    heads = word(block, KV_HEADS) * word(block, GROUP)
    target = word(block, OUT) + (row * heads + head) * dim * size
    accumulator = state + 128 + padded_bytes(block)
    norm = spread(total(load_f32(state + 64)))
    if is_paired(block, kind):
        for i in range(0, dim, 2 * LANES):
            even, odd = load_f32(accumulator + 4 * i) / norm, load_f32(accumulator + 4 * i + 64) / norm
            store_interleaved_bf16(target + i * size, even, odd)
    else:
        for i in range(0, dim, LANES):
            store_part(kind, target + i * size, load_f32(accumulator + 4 * i) / norm, dim - i)


@inline
def _tokens(block, unit):
    """What a unit attends to: its sequence's blocks, its key/value head, the first token of its first tile,
    the end of its last."""
    heads = word(block, KV_HEADS)
    run = word(block, RUNS) + 12 * (unit // heads)
    table = word(block, TABLES) + 4 * load_i32(run) * word(block, TABLE_ROW)
    position = load_i64(word(block, POSITIONS) + 8 * load_i32(run + 4))  # of the first row; others follow it
    base = max(0, position + 1 - word(block, WINDOW)) // TILE * TILE
    return table, unit % heads, base, position + load_i32(run + 8)


@merge
def _run(block, kind, scratch, unit):
    """One run of rows and one key/value head."""
    table, head, base, end = _tokens(block, unit)
    run = word(block, RUNS) + 12 * (unit // word(block, KV_HEADS))
    row, rows = load_i32(run + 4), load_i32(run + 8)
    group = word(block, GROUP)
    each = state_bytes(block)
    states = scratch + STATES_AT
    staged = states + rows * group * each
    position = end - rows
    ahead = (table, head, end, table, head, 0, 0)
    for i in range(rows * group):
        _load_query(block, kind, row + i // group, head * group + i % group, states + i * each)
    while base < end:
        find_groups(block, kind, table, base, end, head, scratch, staged)
        if base + 2 * TILE > end:
            following = fetch_add(block, 0)  # unless another thread is sooner
            if following < word(block, UNITS):
                next_table, next_head, next_base, next_end = _tokens(block, following)
                ahead = (table, head, end, next_table, next_head, next_base, next_end)
        part = 0
        for i in range(max(0, base - position), rows):
            last = position + i + 1
            first = max(0, last - word(block, WINDOW))
            if first < base + TILE:
                for g in range(0, group, 2):
                    state, count = states + (i * group + g) * each, min(2, group - g)
                    _attend(block, kind, scratch, state, count, (base, first, last), ahead, part)
                    part += 1
        base += TILE
    for i in range(rows * group):
        _finish(block, kind, row + i // group, head * group + i % group, states + i * each)


def _attention(variant: int) -> Any:
    def attention(block):
        kind = variant & 3
        scratch = word(block, SCRATCH) + fetch_add(block + 8, 1) * word(block, SCRATCH_BYTES)
        unit = fetch_add(block, 1)
        while unit < word(block, UNITS):
            _run(block, kind, scratch, unit)
            unit = fetch_add(block, 1)

    return attention


paged_attention = Kernel(_attention)
