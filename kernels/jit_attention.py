"""Paged causal attention without a gather: decode rows and prefill rows by the same arithmetic.

A unit of work is a few rows of one entry and the query heads that share one key/value head: each key/value
tile is read once for all of them. One row of one head walks the tiles of 64 tokens from fixed absolute
positions in order (online softmax, base 2): its result depends on its position, its query and the pool alone,
not on what is computed beside it, so a prefill chunk and a decode step give the same bits.

A pool is read in place where groups of 16 tokens lie as `jit_tile` wants them. Else they are widened into a
scratch tile first, with zeros for missing dimensions. Values past the end of a sequence are zeros too: their
weight is 0, but their memory may hold anything.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ellm.kernels.jit_launch import HEADER, Kernel
from ellm.kernels.jit_math import exp2
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
from ellm.kernels.jit_vector import (
    BF16,
    F16,
    F32,
    LANES,
    copy_bytes,
    fetch_add,
    float_from_bits,
    inline,
    item_size,
    keep_lanes,
    larger,
    load_f32,
    load_float,
    load_i32,
    load_i64,
    load_part,
    peak,
    spread,
    store_f32,
    store_float,
    store_i64,
    store_part,
    total,
)

TILE = 64  # tokens between two updates of the running maximum
GROUPS = TILE // LANES
MAX_VECTORS = 32  # (row, head) pairs of a unit, if one row has not more
NEG_INF = np.float32(-np.inf)

# The words of the block, after the header.
(
    UNITS,  # runs of rows * key/value heads
    RUNS,  # address of [runs, 3] int32: entry, first row, rows
    KV_HEADS,
    GROUP,  # query heads of a key/value head
    DIM,
    BLOCK,  # tokens
    WINDOW,  # tokens a row sees, itself included
    SCALE,  # bits of scale * log2(e)
    Q,
    Q_ROW,  # bytes
    Q_HEAD,
    OUT,  # [R, H, D]
    K_POOL,
    K_BLOCK,
    K_HEAD,
    K_TOKEN,
    V_POOL,
    V_BLOCK,
    V_HEAD,
    V_TOKEN,
    TABLES,
    TABLE_ROW,  # entries
    POSITIONS,
    SCRATCH,
    SCRATCH_BYTES,  # of a thread
    IN_PLACE,  # 1 if the pool is read without a copy: see `reads_in_place`
) = range(26)

# A thread's scratch: where the tile's groups lie; the tile's weights; a state per vector (running maximum,
# padded to 16; 16 partial sums of weights; query; accumulator); widened keys and values, [TILE, D] each.
SOURCES_BYTES = 8 * 2 * GROUPS  # addresses of the tile's groups: keys, then values


def reads_in_place(kind: int, dim: int, block_size: int, token_bytes: int) -> bool:
    """Whether groups of 16 tokens lie in the pool as `jit_tile` wants them."""
    size = 4 if kind == F32 else 2
    fits = kind != F16 and dim * size % 64 == 0
    return fits and block_size % LANES == 0 and token_bytes == dim * size


def scratch_bytes(vectors: int, dim: int) -> int:
    """Of one thread, for `vectors` (row, head) pairs at once."""
    padded = -(-dim // LANES) * LANES
    states = vectors * 4 * (2 * padded + 2 * LANES)
    return SOURCES_BYTES + 4 * TILE + states + 2 * 4 * TILE * padded


@inline
def _word(block, index):
    return load_i64(block + 8 * (HEADER + index))


@inline
def _padded(block):
    """Bytes of a query or an accumulator: float32, padded to whole vectors."""
    return (_word(block, DIM) + LANES - 1) // LANES * 64


@inline
def _paired(block, kind):
    """Whether vectors hold even and odd dimensions apart: a bfloat16 pool read in place."""
    return kind == BF16 and _word(block, IN_PLACE) != 0


@inline
def _token_bytes(block, kind):
    """From one token of a group to the next."""
    return _padded(block) // 2 if _paired(block, kind) else _padded(block)


@inline
def _load_query(block, kind, row, head, state):
    dim = _word(block, DIM)
    size = item_size(kind)
    scale = float_from_bits(_word(block, SCALE))
    source = _word(block, Q) + row * _word(block, Q_ROW) + head * _word(block, Q_HEAD)
    store_float(state, NEG_INF)
    store_f32(state + 64, spread(np.float32(0.0)))
    query = state + 128
    if _paired(block, kind):
        for i in range(0, dim, 2 * LANES):
            split_bf16(query + 4 * i, source + i * size, scale)
    else:
        for i in range(0, dim, LANES):
            store_f32(query + 4 * i, load_part(kind, source + i * size, dim - i) * spread(scale))
    for i in range(0, _padded(block), 64):
        store_f32(query + _padded(block) + i, spread(np.float32(0.0)))


@inline
def _place(block, side, table, index, head):
    """Address of the first key (side K_POOL) or value (side V_POOL) of a sequence's block `index`."""
    number = load_i32(table + 4 * index)
    return _word(block, side) + number * _word(block, side + 1) + head * _word(block, side + 2)


@inline
def _stage(block, kind, side, table, position, head, tokens, target):
    """Copy up to 16 tokens from `position` on into `target`, widened if need be; zeros where none is."""
    dim, size, stride = _word(block, DIM), item_size(kind), _word(block, side + 3)
    width = _token_bytes(block, kind)
    index = position // _word(block, BLOCK)
    offset = position - index * _word(block, BLOCK)
    source = _place(block, side, table, index, head) + offset * stride
    for _ in range(tokens):
        if offset == _word(block, BLOCK):
            index, offset = index + 1, 0
            source = _place(block, side, table, index, head)
        if _word(block, IN_PLACE) != 0:
            copy_bytes(target, source, width)
        else:
            for i in range(0, dim, LANES):
                store_f32(target + 4 * i, load_part(kind, source + i * size, dim - i))
        source, offset = source + stride, offset + 1
        target += width
    for i in range(0, (LANES - tokens) * width, 64):
        store_f32(target + i, spread(np.float32(0.0)))


@inline
def _find_groups(block, kind, table, base, end, head, scratch, staged):
    """Write where the tile's groups of 16 keys and values lie, copying those that cannot be read in place."""
    for group in range(GROUPS):
        position = base + group * LANES
        tokens = min(LANES, end - position)
        if tokens > 0:
            for pair in range(2):
                side = K_POOL + pair * (V_POOL - K_POOL)
                if _word(block, IN_PLACE) == 0 or (pair == 1 and tokens < LANES):
                    source = staged + (pair * GROUPS + group) * LANES * _padded(block)
                    _stage(block, kind, side, table, position, head, tokens, source)
                else:
                    index = position // _word(block, BLOCK)
                    offset = position - index * _word(block, BLOCK)
                    source = _place(block, side, table, index, head) + offset * _word(block, side + 3)
                store_i64(scratch + 8 * (pair * GROUPS + group), source)


@inline
def _scores(block, kind, query, keys):
    if _paired(block, kind):
        return scores_bf16(query, keys, _padded(block) // 2, _padded(block) // 128)
    return scores_f32(query, keys, _padded(block), _padded(block) // 64)


@inline
def _add_group(block, kind, weights, values, out):
    done, stride = 0, _token_bytes(block, kind)
    if _paired(block, kind):
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
    query, accumulator = state + 128, state + 128 + _padded(block)
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
        for i in range(0, _padded(block), 64):
            store_f32(accumulator + i, load_f32(accumulator + i) * decay)
    for group in range(begin, end):
        values = load_i64(scratch + 8 * (GROUPS + group))
        _add_group(block, kind, weights + 64 * group, values, accumulator)


@inline
def _finish(block, kind, row, head, state):
    dim = _word(block, DIM)
    size = item_size(kind)
    heads = _word(block, KV_HEADS) * _word(block, GROUP)
    target = _word(block, OUT) + (row * heads + head) * dim * size
    accumulator = state + 128 + _padded(block)
    norm = spread(total(load_f32(state + 64)))
    if _paired(block, kind):
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
    group = _word(block, GROUP)
    state_bytes = 128 + 2 * _padded(block)
    states = scratch + SOURCES_BYTES + 4 * TILE
    staged = states + rows * group * state_bytes
    for i in range(rows * group):
        _load_query(block, kind, row + i // group, head * group + i % group, states + i * state_bytes)
    table = _word(block, TABLES) + 4 * entry * _word(block, TABLE_ROW)
    position = load_i64(_word(block, POSITIONS) + 8 * row)  # of the first row; the others follow it
    end = position + rows
    base = max(0, position + 1 - _word(block, WINDOW)) // TILE * TILE
    while base < end:
        _find_groups(block, kind, table, base, end, head, scratch, staged)
        for i in range(max(0, base - position), rows):
            last = position + i + 1
            first = max(0, last - _word(block, WINDOW))
            if first < base + TILE:
                for vector in range(i * group, (i + 1) * group):
                    _attend(block, kind, scratch, states + vector * state_bytes, base, first, last)
        base += TILE
    for i in range(rows * group):
        _finish(block, kind, row + i // group, head * group + i % group, states + i * state_bytes)


def _attention(variant: int) -> Any:
    def attention(block):
        kind = variant & 3
        scratch = _word(block, SCRATCH) + fetch_add(block + 8, 1) * _word(block, SCRATCH_BYTES)
        heads = _word(block, KV_HEADS)
        unit = fetch_add(block, 1)
        while unit < _word(block, UNITS):
            _run(block, kind, scratch, _word(block, RUNS) + 12 * (unit // heads), unit % heads)
            unit = fetch_add(block, 1)

    return attention


paged_attention = Kernel(_attention)
