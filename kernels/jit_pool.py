"""Where attention's keys and values lie, and the words of its block.

A pool is read in place where groups of 16 tokens lie as `jit_tile` wants them. Else they are widened into a
scratch tile first, with zeros for missing dimensions. Values past the end of a sequence are zeros too: their
weight is 0, but their memory may hold anything.
"""

from __future__ import annotations

import numpy as np

from ellm.kernels.jit_ir import LANES, inline
from ellm.kernels.jit_memory import (
    BF16,
    F16,
    F32,
    copy_bytes,
    item_size,
    load_i32,
    load_part,
    store_f32,
    store_i64,
    word,
)
from ellm.kernels.jit_tile import TILE, TILE_BYTES
from ellm.kernels.jit_vector import spread

GROUPS = TILE // LANES  # of a tile
MAX_VECTORS = 32  # (row, head) pairs of a unit, if one row has not more

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

# A thread's scratch: where the tile's groups lie; the tile's weights of two vectors; a state per vector
# (running maximum, padded to 16; 16 partial sums of weights; query; accumulator); widened keys and values.
WEIGHTS_AT = 8 * 2 * GROUPS  # after the addresses of the tile's groups: keys, then values
STATES_AT = WEIGHTS_AT + 2 * TILE_BYTES


def reads_in_place(kind: int, dim: int, block_size: int, stride: int) -> bool:
    """Whether groups of 16 tokens, `stride` bytes from one to the next, lie as `jit_tile` wants them."""
    size = 4 if kind == F32 else 2
    fits = kind != F16 and dim * size % 64 == 0
    return fits and block_size % LANES == 0 and stride == dim * size


def scratch_bytes(vectors: int, dim: int) -> int:
    """Of one thread, for `vectors` (row, head) pairs at once."""
    padded = -(-dim // LANES) * LANES
    states = vectors * 4 * (2 * padded + 2 * LANES)
    return STATES_AT + states + 2 * 4 * TILE * padded


@inline
def padded_bytes(block):
    """Bytes of a query or an accumulator: float32, padded to whole vectors."""
    return (word(block, DIM) + LANES - 1) // LANES * 64


@inline
def is_paired(block, kind):
    """Whether vectors hold even and odd dimensions apart: a bfloat16 pool read in place."""
    return kind == BF16 and word(block, IN_PLACE) != 0


@inline
def token_bytes(block, kind):
    """From one token of a group to the next."""
    return padded_bytes(block) // 2 if is_paired(block, kind) else padded_bytes(block)


@inline
def _place(block, side, table, index, head):
    """Address of the first key (side K_POOL) or value (side V_POOL) of a sequence's block `index`."""
    number = load_i32(table + 4 * index)
    return word(block, side) + number * word(block, side + 1) + head * word(block, side + 2)


@inline
def _stage(block, kind, side, table, position, head, tokens, target):
    """Copy up to 16 tokens from `position` on into `target`, widened if need be; zeros where none is."""
    dim, size, stride = word(block, DIM), item_size(kind), word(block, side + 3)
    width = token_bytes(block, kind)
    index = position // word(block, BLOCK)
    offset = position - index * word(block, BLOCK)
    source = _place(block, side, table, index, head) + offset * stride
    for _ in range(tokens):
        if offset == word(block, BLOCK):
            index, offset = index + 1, 0
            source = _place(block, side, table, index, head)
        if word(block, IN_PLACE) != 0:
            copy_bytes(target, source, width)
        else:
            for i in range(0, dim, LANES):
                store_f32(target + 4 * i, load_part(kind, source + i * size, dim - i))
        source, offset = source + stride, offset + 1
        target += width
    for i in range(0, (LANES - tokens) * width, 64):
        store_f32(target + i, spread(np.float32(0.0)))


@inline
def find_groups(block, kind, table, base, end, head, scratch, staged):
    """Write where the tile's groups of 16 keys and values lie, copying those that cannot be read in place."""
    for group in range(GROUPS):
        position = base + group * LANES
        tokens = min(LANES, end - position)
        if tokens > 0:
            for pair in range(2):
                side = K_POOL + pair * (V_POOL - K_POOL)
                if word(block, IN_PLACE) == 0 or (pair == 1 and tokens < LANES):
                    source = staged + (pair * GROUPS + group) * LANES * padded_bytes(block)
                    _stage(block, kind, side, table, position, head, tokens, source)
                else:
                    index = position // word(block, BLOCK)
                    offset = position - index * word(block, BLOCK)
                    source = _place(block, side, table, index, head) + offset * word(block, side + 3)
                store_i64(scratch + 8 * (pair * GROUPS + group), source)


@inline
def ahead_of(block, side, ahead, position, here):
    """Where the group lies that comes a tile after the one at `position`: blocks lie anywhere, no hardware
    would guess it. If nothing follows, `here`, which is near already.

    `ahead` is the present unit's table, head and end, then table, head, first token and end of the unit that
    is given out next: this thread's if no other asks before."""
    table, head, end, next_table, next_head, next_base, next_end = ahead
    position += TILE
    if position >= end:
        position += next_base - (end + LANES - 1) // LANES * LANES
        table, head, end = next_table, next_head, next_end
    if position >= end:
        return here
    index = position // word(block, BLOCK)
    offset = position - index * word(block, BLOCK)
    return _place(block, side, table, index, head) + offset * word(block, side + 3)
