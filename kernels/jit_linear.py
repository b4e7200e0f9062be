"""Linear layers of few rows and of many by one loop: out = x W^T + b, each sum in one chain along the inputs.

The weight lies in panels of 16 outputs: for each input in turn its weights to these 16. A tile of the result
(rows x panels) stays in registers while both are walked once: 6 x 1 of 16 lanes fill the 16 registers of
AVX2 with 12 sums, 2 weights and an input. An output is one chain of fused multiply-adds in the order of the
inputs, the bias added last, whatever tile it is in: it has the same bits in a batch of any size (STRICT).

Half-precision weights stay as they are in memory and are widened in registers, which is exact: a step of few
rows, which waits for memory alone, reads half the bytes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

import ellm.kernels.jit_vector  # noqa: F401  (the sum of two vectors)
from ellm.kernels.jit_ir import (
    FLOAT,
    LANES,
    VEC,
    fma_vector,
    inline,
    instruction,
    load_vector,
    pointer_to,
    splat,
    widen_bf16,
)
from ellm.kernels.jit_launch import Kernel
from ellm.kernels.jit_memory import BF16, F16, F32, fetch_add, item_size, load_f32, store_part, word

GROUP = 4  # panels: weights are padded to whole groups
MOST_ROWS = 6  # of a tile
SUMS_BYTES = MOST_ROWS * 4 * LANES  # of the largest tile
_UNROLL = 4  # inputs

# The words of the block, after the header.
(
    UNITS,  # runs of panels * blocks of rows
    WIDTH,  # panels of a unit: 2 or 4
    RUNS,  # of so many panels
    BLOCK_ROWS,
    ROWS,
    INPUTS,
    OUTPUTS,
    X,  # float32
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
    if kind == BF16:
        return widen_bf16(builder, load_vector(builder, address, ir.IntType(16)))
    return builder.fpext(load_vector(builder, address, ir.HalfType()), VEC)


def _tile(kind: int, rows: int, panels: int) -> Any:
    """(x, x row bytes, weight, inputs, out): sums of `rows` x `panels`, 16 floats each, side by side."""

    def emit(builder: Any, x: Any, x_row: Any, weight: Any, inputs: Any, out: Any) -> None:
        size = _word(LANES * (4 if kind == F32 else 2))  # of an input's weights to a panel
        zero = ir.Constant(VEC, None)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(panels)] for _ in range(rows)]
        xs, weights = [x], [weight]
        for _ in range(rows - 1):
            xs.append(builder.add(xs[-1], x_row))
        for _ in range(panels - 1):
            weights.append(builder.add(weights[-1], builder.mul(inputs, size)))

        def step(i: Any) -> None:
            at = builder.mul(i, size)
            parts = [_read(builder, kind, builder.add(w, at)) for w in weights]
            for row, own in zip(xs, sums, strict=True):
                address = builder.add(row, builder.mul(i, _word(4)))
                value = splat(builder, builder.load(pointer_to(builder, address, FLOAT), typ=FLOAT, align=1))
                for part, slot in zip(parts, own, strict=True):
                    builder.store(fma_vector(builder, value, part, builder.load(slot)), slot)

        whole = builder.udiv(inputs, _word(_UNROLL))
        with cgutils.for_range(builder, whole) as loop:
            for i in range(_UNROLL):
                step(builder.add(builder.mul(loop.index, _word(_UNROLL)), _word(i)))
        with cgutils.for_range(builder, inputs, builder.mul(whole, _word(_UNROLL))) as loop:
            step(loop.index)
        for i, slot in enumerate(slot for own in sums for slot in own):
            target = pointer_to(builder, builder.add(out, _word(4 * LANES * i)), VEC)
            builder.store(builder.load(slot), target, align=4)

    return instruction(types.void, *[types.intp] * 5)(emit)


def _tiles(kind: int) -> Any:
    """(rows, x, x row bytes, weight, inputs, out): one row by four or two panels, two and three by two,
    more by one; returns the panels done."""
    one_four, one_two = _tile(kind, 1, 4), _tile(kind, 1, 2)
    two, three = _tile(kind, 2, 2), _tile(kind, 3, 2)
    four, five, six = _tile(kind, 4, 1), _tile(kind, 5, 1), _tile(kind, 6, 1)

    @inline
    def run(rows, width, x, x_row, weight, inputs, out):
        if rows == 1:
            if width == GROUP:
                one_four(x, x_row, weight, inputs, out)
                return 4
            one_two(x, x_row, weight, inputs, out)
            return 2
        if rows <= 3:
            if rows == 2:
                two(x, x_row, weight, inputs, out)
            else:
                three(x, x_row, weight, inputs, out)
            return 2
        if rows == 4:
            four(x, x_row, weight, inputs, out)
        elif rows == 5:
            five(x, x_row, weight, inputs, out)
        else:
            six(x, x_row, weight, inputs, out)
        return 1

    return run


_run_f32, _run_bf16, _run_f16 = _tiles(F32), _tiles(BF16), _tiles(F16)


@inline
def _run(kind, rows, width, x, x_row, weight, inputs, out):
    if kind == F32:
        return _run_f32(rows, width, x, x_row, weight, inputs, out)
    if kind == BF16:
        return _run_bf16(rows, width, x, x_row, weight, inputs, out)
    return _run_f16(rows, width, x, x_row, weight, inputs, out)


@inline
def _rows_of_tile(left):
    """At most MOST_ROWS, and the last two tiles alike: 8 are 4 and 4."""
    if left <= MOST_ROWS:
        return left
    return MOST_ROWS if left >= 2 * MOST_ROWS else (left + 1) // 2


@inline
def _write(block, kind, sums, rows, panels, row, panel):
    """A tile's sums to their place, with the bias."""
    bias, outputs, size = word(block, BIAS), word(block, OUTPUTS), item_size(kind)
    for c in range(panels):
        first = (panel + c) * LANES
        count = min(LANES, outputs - first)
        if count > 0:
            for r in range(rows):
                value = load_f32(sums + 4 * LANES * (r * panels + c))
                if bias != 0:
                    value = value + load_f32(bias + 4 * first)
                out = word(block, OUT) + (row + r) * word(block, OUT_ROW)
                store_part(kind, out + first * size, value, count)


def _linear(variant: int) -> Any:
    def linear(block):
        """words: see above"""
        kind = variant & 3
        inputs, width, x_row = word(block, INPUTS), word(block, WIDTH), word(block, X_ROW)
        panel_bytes = inputs * LANES * item_size(kind)
        sums = word(block, SCRATCH) + fetch_add(block + 8, 1) * SUMS_BYTES
        unit = fetch_add(block, 1)
        while unit < word(block, UNITS):
            run, part = unit % word(block, RUNS), unit // word(block, RUNS)
            row = part * word(block, BLOCK_ROWS)
            last = min(row + word(block, BLOCK_ROWS), word(block, ROWS))
            while row < last:
                rows = _rows_of_tile(last - row)
                x = word(block, X) + row * x_row
                panel = run * width
                while panel < (run + 1) * width:
                    weight = word(block, WEIGHT) + panel * panel_bytes
                    panels = _run(kind, rows, width, x, x_row, weight, inputs, sums)
                    _write(block, kind, sums, rows, panels, row, panel)
                    panel += panels
                row += rows
            unit = fetch_add(block, 1)

    return linear


linear = Kernel(_linear)
