"""Linear layers of few rows and of many by one loop: out = x W^T + b, each sum in one chain along the inputs.

The weight lies in panels of 16 outputs: for each input in turn its weights to these 16. A tile of the result
(rows x panels) stays in registers while both are walked: 6 x 1 of 16 lanes fill the 16 registers of AVX2 with
12 sums, 2 weights and an input; AVX-512, whose registers hold all 16 lanes, takes 6 x 2. An output is one
chain of fused multiply-adds in the order of the inputs, the bias added last, whatever tile it is in: it has
the same bits in a batch of any size (STRICT).

Two to eight tiles take turns at chunks of the inputs, whose weights are read from memory once, while the
chunk before is multiplied: the layers of a decode step take as long as the longer of the two, not as both.

Half-precision weights stay as they are in memory and are widened in registers, which is exact: a step of few
rows, which waits for memory alone, reads half the bytes. Where the processor multiplies bfloat16 by itself
(AVX512_BF16), a chain takes a pair of inputs at a time (PAIRS): the weights of a pair lie side by side,
inputs stay bfloat16, and each pair is counted as one input.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from ellm.kernels.jit_ir import (
    FLOAT,
    I32,
    LANES,
    PAIRS_VEC,
    VEC,
    ask,
    compiled_for,
    dot_vector,
    fma_vector,
    inline,
    instruction,
    load_vector,
    pointer_to,
    splat,
    widen_bf16,
)
from ellm.kernels.jit_launch import Kernel
from ellm.kernels.jit_memory import (
    BF16,
    F16,
    F32,
    fetch_add,
    item_size,
    load_f32,
    store_f32,
    store_part,
    word,
)
from ellm.kernels.jit_vector import spread

PAIRS = 3  # an element kind, beside those of `jit_memory`
GROUP = 4  # panels: weights are padded to whole groups
MOST_ROWS = 6  # of a tile
_PANELS = 2 if compiled_for("avx512f") else 1  # of a tile of so many rows
HAS_PAIRS = compiled_for("avx512bf16")
_TILES_CHUNKED = 8  # of more, those before the last 8 run one by one: inputs are more to read than weights
_TILE_BYTES = MOST_ROWS * _PANELS * 4 * LANES  # of the sums of the largest
SUMS_BYTES = (1 + _TILES_CHUNKED) * _TILE_BYTES  # zeros, and the sums of these tiles
_CHUNK = 128 // _PANELS  # inputs whose weights stay in the nearest cache for all these rows
_AHEAD = 8192  # bytes, at most
_UNROLL = 4  # inputs

# The words of the block, after the header.
(
    UNITS,  # runs of panels * blocks of rows
    WIDTH,  # panels of a unit: 2 or 4
    RUNS,  # of so many panels
    BLOCK_ROWS,
    ROWS,
    INPUTS,  # or pairs of them
    OUTPUTS,
    X,  # float32, or pairs
    X_ROW,  # bytes
    WEIGHT,
    BIAS,  # float32, padded as the weight is; or 0
    OUT,
    OUT_ROW,  # bytes
    SCRATCH,  # SUMS_BYTES for each thread
) = range(14)


def _word(number: int) -> Any:
    return ir.Constant(ir.IntType(64), number)


def _read(builder: Any, kind: int, address: Any) -> Any:
    if kind == F32:
        return load_vector(builder, address)
    if kind == PAIRS:
        return builder.load(pointer_to(builder, address, PAIRS_VEC), typ=PAIRS_VEC, align=1)
    if kind == BF16:
        return widen_bf16(builder, load_vector(builder, address, ir.IntType(16)))
    return builder.fpext(load_vector(builder, address, ir.HalfType()), VEC)


def _everywhere(builder: Any, kind: int, address: Any) -> Any:
    """One input, or a pair of them, for all lanes."""
    if kind == PAIRS:
        pair = builder.load(pointer_to(builder, address, I32), typ=I32, align=1)
        return builder.bitcast(splat(builder, pair), PAIRS_VEC)
    return splat(builder, builder.load(pointer_to(builder, address, FLOAT), typ=FLOAT, align=1))


def _apart(builder: Any, first: Any, distance: Any, count: int) -> list[Any]:
    addresses = [first]
    while len(addresses) < count:
        addresses.append(builder.add(addresses[-1], distance))
    return addresses


def _vector_at(builder: Any, address: Any, index: int) -> Any:
    return pointer_to(builder, builder.add(address, _word(4 * LANES * index)), VEC)


def _tile(kind: int, rows: int, panels: int) -> Any:
    """(x, x row bytes, weight, panel bytes, inputs, before, out, ahead, pace): the sums of `rows` x `panels`,
    16 floats each, side by side, from those `before` on by so many inputs. Meanwhile the memory is asked for
    what lies `ahead` bytes behind the weights, `pace` bytes for each input; but not for one row's streams,
    which the processor sees by itself."""
    multiply_add = dot_vector if kind == PAIRS else fma_vector
    weight_size = 4 if kind in (F32, PAIRS) else 2

    def emit(builder: Any, *values: Any) -> None:
        x, x_row, weight, panel_bytes, inputs, before, out, ahead, pace = values
        size = _word(LANES * weight_size)  # of an input's weights to a panel
        xs, weights = _apart(builder, x, x_row, rows), _apart(builder, weight, panel_bytes, panels)
        later = [builder.add(w, ahead) for w in weights] if rows > 1 else []
        starts = [
            builder.load(_vector_at(builder, before, i), typ=VEC, align=4) for i in range(rows * panels)
        ]
        sums = [cgutils.alloca_once_value(builder, start) for start in starts]

        def step(i: Any) -> None:
            parts = [_read(builder, kind, builder.add(w, builder.mul(i, size))) for w in weights]
            for r, row in enumerate(xs):
                value = _everywhere(builder, kind, builder.add(row, builder.mul(i, _word(4))))
                for part, slot in zip(parts, sums[r * panels :], strict=False):
                    builder.store(multiply_add(builder, value, part, builder.load(slot)), slot)

        whole = builder.udiv(inputs, _word(_UNROLL))
        with cgutils.for_range(builder, whole) as loop:
            for i in range(_UNROLL):
                number = builder.add(builder.mul(loop.index, _word(_UNROLL)), _word(i))
                if weight_size == 4 or i % 2 == 0:  # a line of memory holds one input's weights, or two's
                    for w in later:
                        ask(builder, builder.add(w, builder.mul(number, pace)))
                step(number)
        with cgutils.for_range(builder, inputs, builder.mul(whole, _word(_UNROLL))) as loop:
            step(loop.index)
        for i, slot in enumerate(sums):
            builder.store(builder.load(slot), _vector_at(builder, out, i), align=4)

    return instruction(types.void, *[types.intp] * 9)(emit)


def _tiles(kind: int) -> Any:
    """(rows, width, what a tile takes): up to 3 rows by 2 or 4 panels, more by as many as there are registers
    for, and where the unit is one panel wide three by one; returns the panels done."""
    one_four, one_two = _tile(kind, 1, 4), _tile(kind, 1, 2)
    two, three = _tile(kind, 2, 2), _tile(kind, 3, 2)
    three_one = _tile(kind, 3, 1)
    four, five, six = (_tile(kind, rows, _PANELS) for rows in (4, 5, 6))

    @inline
    def run(rows, width, *tile):
        if rows == 6:
            six(*tile)
        elif rows == 5:
            five(*tile)
        elif rows == 4:
            four(*tile)
        elif width == 1:
            three_one(*tile)
        elif rows == 3:
            three(*tile)
            return 2
        elif rows == 2:
            two(*tile)
            return 2
        elif width == GROUP:
            one_four(*tile)
            return 4
        else:
            one_two(*tile)
            return 2
        return 1 if rows == 3 else _PANELS

    return run


_run_f32, _run_bf16, _run_f16 = _tiles(F32), _tiles(BF16), _tiles(F16)
_run_pairs = _tiles(PAIRS) if HAS_PAIRS else _run_bf16


@inline
def _run(kind, rows, width, *tile):
    if kind == F32:
        return _run_f32(rows, width, *tile)
    if kind == PAIRS:
        return _run_pairs(rows, width, *tile)
    if kind == BF16:
        return _run_bf16(rows, width, *tile)
    return _run_f16(rows, width, *tile)


@inline
def _rows_of_tile(left, tiles):
    """Of the next of so many, which are as alike as can be: 19 rows are 5, 5, 5 and 4."""
    return (left - 1) // tiles + 1


@inline
def _write(block, kind, sums, rows, panels, row, panel):
    """A tile's sums to their place, with the bias."""
    stored = BF16 if kind == PAIRS else kind
    bias, outputs, size = word(block, BIAS), word(block, OUTPUTS), item_size(stored)
    for c in range(panels):
        first = (panel + c) * LANES
        count = min(LANES, outputs - first)
        if count > 0:
            for r in range(rows):
                value = load_f32(sums + 4 * LANES * (r * panels + c))
                if bias != 0:
                    value = value + load_f32(bias + 4 * first)
                out = word(block, OUT) + (row + r) * word(block, OUT_ROW)
                store_part(stored, out + first * size, value, count)


@inline
def _walk(block, kind, scratch, first, left, tiles, panel):
    """`left` rows from `first` on, in so many tiles, by the panels of a unit. One tile takes all inputs of
    several panels at once. More take turns at each chunk of the weights of one panel, or of two, and each
    asks for about its share of as many inputs after it."""
    inputs, x_row = word(block, INPUTS), word(block, X_ROW)
    size = 4 * LANES if kind == PAIRS else LANES * item_size(kind)
    width, chunk = word(block, WIDTH), inputs
    if tiles > 1:
        width, chunk = _PANELS, _CHUNK
    end = panel + word(block, WIDTH)
    while panel < end:
        weight, done, panels = word(block, WEIGHT) + panel * inputs * size, 0, 1
        while done < inputs:
            count, rest = min(chunk, inputs - done), left
            x, sums = word(block, X) + first * x_row + 4 * done, scratch + _TILE_BYTES
            for tile in range(tiles):
                rows, before = _rows_of_tile(rest, tiles - tile), scratch if done == 0 else sums
                ahead = min(count * size, _AHEAD) + tile * count * size // tiles
                at = (x, x_row, weight, inputs * size, count, before, sums, ahead, size // tiles)
                panels = _run(kind, rows, width, *at)
                x, sums, rest = x + rows * x_row, sums + _TILE_BYTES, rest - rows
            weight, done = weight + count * size, done + count
        sums, rest = scratch + _TILE_BYTES, left
        for tile in range(tiles):
            rows = _rows_of_tile(rest, tiles - tile)
            _write(block, kind, sums, rows, panels, first + left - rest, panel)
            sums, rest = sums + _TILE_BYTES, rest - rows
        panel += panels


def _linear(variant: int) -> Any:
    def linear(block):
        """words: see above"""
        kind = variant & 3
        scratch = word(block, SCRATCH) + fetch_add(block + 8, 1) * SUMS_BYTES
        for i in range(_TILE_BYTES // (4 * LANES)):
            store_f32(scratch + 4 * LANES * i, spread(0.0))
        unit = fetch_add(block, 1)
        while unit < word(block, UNITS):
            panel = unit % word(block, RUNS) * word(block, WIDTH)
            row = unit // word(block, RUNS) * word(block, BLOCK_ROWS)
            rows = min(word(block, BLOCK_ROWS), word(block, ROWS) - row)
            while rows > 0:
                tiles = (rows - 1) // MOST_ROWS + 1
                together = tiles if tiles <= _TILES_CHUNKED else 1
                count = rows if together == tiles else _rows_of_tile(rows, tiles)
                _walk(block, kind, scratch, row, count, together, panel)
                row, rows = row + count, rows - count
            unit = fetch_add(block, 1)

    return linear


linear = Kernel(_linear)
