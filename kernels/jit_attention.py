"""Paged causal attention without a gather: decode rows and prefill rows by the same arithmetic.

A unit of work is a few rows of one entry and the query heads that share one key/value head: each key/value
tile is read once for all of them. One row of one head walks the tiles of 64 tokens from fixed absolute
positions in order (online softmax, base 2): its result depends on its position, its query and the pool alone,
not on what is computed beside it, so a prefill chunk and a decode step give the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ellm.kernels.jit_ir import LANES, inline
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
    KV_HEADS,
    OUT,
    POSITIONS,
    Q_HEAD,
    Q_ROW,
    RUNS,
    SCALE,
    SCRATCH,
    SCRATCH_BYTES,
    SOURCES_BYTES,
    TABLE_ROW,
    TABLES,
    TILE,
    UNITS,
    WINDOW,
    Q,
    fetch_groups,
    find_groups,
    is_paired,
    padded_bytes,
    token_bytes,
)
from ellm.kernels.jit_tile import (
    add_weighted_bf16_1,
    add_weighted_bf16_2,
    add_weighted_f32_1,
    add_weighted_f32_4,
    scores_bf16,
    scores_f32,
    split_bf16,
    store_interleaved_bf16,
)
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
def _scores(block, kind, query, keys):
    if is_paired(block, kind):
        return scores_bf16(query, keys, padded_bytes(block) // 2, padded_bytes(block) // 128)
    return scores_f32(query, keys, padded_bytes(block), padded_bytes(block) // 64)


@inline
def _add_group(block, kind, weights, values, out):
    done, stride = 0, token_bytes(block, kind)
    if is_paired(block, kind):
        while done + 128 <= stride:
            add_weighted_bf16_2(weights, values + done, stride, out + 2 * done)
            done += 128
        if done < stride:
            add_weighted_bf16_1(weights, values + done, stride, out + 2 * done)
    else:
        while done + 256 <= stride:
            add_weighted_f32_4(weights, values + done, stride, out + done)
            done += 256
        while done < stride:
            add_weighted_f32_1(weights, values + done, stride, out + done)
            done += 64


@inline
def _attend(block, kind, scratch, state, base, first, last):
    """One vector over the tokens [first, last) of the tile that starts at position `base`."""
    query, accumulator = state + 128, state + 128 + padded_bytes(block)
    weights = scratch + SOURCES_BYTES
    begin, end = max(0, first - base) // LANES, min(GROUPS, (last - base + LANES - 1) // LANES)
    old = load_float(state)
    top = spread(old)
    for group in range(begin, end):
        start = base + group * LANES
        score = _scores(block, kind, query, load_i64(scratch + 8 * group))
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
        for i in range(0, padded_bytes(block), 64):
            store_f32(accumulator + i, load_f32(accumulator + i) * decay)
    for group in range(begin, end):
        values = load_i64(scratch + 8 * (GROUPS + group))
        _add_group(block, kind, weights + 64 * group, values, accumulator)


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
def _run(block, kind, scratch, run, head):
    """One run of rows and one key/value head."""
    entry, row, rows = load_i32(run), load_i32(run + 4), load_i32(run + 8)
    group = word(block, GROUP)
    state_bytes = 128 + 2 * padded_bytes(block)
    states = scratch + SOURCES_BYTES + 4 * TILE
    staged = states + rows * group * state_bytes
    for i in range(rows * group):
        _load_query(block, kind, row + i // group, head * group + i % group, states + i * state_bytes)
    table = word(block, TABLES) + 4 * entry * word(block, TABLE_ROW)
    position = load_i64(word(block, POSITIONS) + 8 * row)  # of the first row; the others follow it
    end = position + rows
    base = max(0, position + 1 - word(block, WINDOW)) // TILE * TILE
    while base < end:
        find_groups(block, kind, table, base, end, head, scratch, staged)
        fetch_groups(block, table, base + TILE, end, head)
        for i in range(max(0, base - position), rows):
            last = position + i + 1
            first = max(0, last - word(block, WINDOW))
            if first < base + TILE:
                for vector in range(i * group, (i + 1) * group):
                    _attend(block, kind, scratch, states + vector * state_bytes, base, first, last)
        base += TILE
    for i in range(rows * group):
        _finish(block, kind, row + i // group, head * group + i % group, states + i * state_bytes)


def _attention(variant: int) -> Any:
    def attention(block):
        kind = variant & 3
        scratch = word(block, SCRATCH) + fetch_add(block + 8, 1) * word(block, SCRATCH_BYTES)
        heads = word(block, KV_HEADS)
        unit = fetch_add(block, 1)
        while unit < word(block, UNITS):
            _run(block, kind, scratch, word(block, RUNS) + 12 * (unit // heads), unit % heads)
            unit = fetch_add(block, 1)

    return attention


paged_attention = Kernel(_attention)
