"""The two inner products of attention, on 16 tokens at a time.

Both do one query vector's arithmetic in one fixed order, whatever else is computed beside it. Dimensions
come in chunks of 16, padded with zeros.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from ellm.kernels.jit_vector import (
    LANES,
    _instruction,
    fma_vector,
    load_vector,
    splat,
    vector,
)

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_VEC = ir.VectorType(ir.FloatType(), LANES)
_CHUNK_BYTES = 4 * LANES


def _word(number: int) -> Any:
    return ir.Constant(_I64, number)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, LANES), lanes))


def _join(builder: Any, a: Any, b: Any, first: list[int], second: list[int]) -> Any:
    return builder.fadd(_shuffle(builder, a, b, first), _shuffle(builder, a, b, second))


def _per_quad(lanes: list[int]) -> list[int]:
    """The same choice in each group of four lanes; 4 and up means the second vector."""
    return [4 * quad + (lane if lane < 4 else lane - 4 + LANES) for quad in range(4) for lane in lanes]


def _per_lane(quads: list[int]) -> list[int]:
    """Whole groups of four lanes; 4 and up means the second vector."""
    return [4 * quad + lane for quad in quads for lane in range(4)]


def _sums(builder: Any, v: list[Any]) -> Any:
    """16 vectors -> the vector of their 16 sums: within four lanes, then over them; cheap shuffles only."""
    first, second = _per_quad([0, 4, 1, 5]), _per_quad([2, 6, 3, 7])
    v = [_join(builder, v[i], v[i + 1], first, second) for i in range(0, 16, 2)]
    first, second = _per_quad([0, 1, 4, 5]), _per_quad([2, 3, 6, 7])
    v = [_join(builder, v[i], v[i + 1], first, second) for i in range(0, 8, 2)]
    first, second = _per_lane([0, 1, 4, 5]), _per_lane([2, 3, 6, 7])
    v = [_join(builder, v[i], v[i + 1], first, second) for i in range(0, 4, 2)]
    return _join(builder, v[0], v[1], _per_lane([0, 2, 4, 6]), _per_lane([1, 3, 5, 7]))


@_instruction(vector, types.intp, types.intp, types.intp, types.intp)
def scores(builder: Any, q: Any, keys: Any, stride: Any, chunks: Any) -> Any:
    """q . k of 16 keys, `stride` bytes apart: chunk by chunk in each lane, then over the lanes."""
    sums = [cgutils.alloca_once_value(builder, ir.Constant(_VEC, None)) for _ in range(LANES)]
    with cgutils.for_range(builder, chunks) as loop:
        at = builder.mul(loop.index, _word(_CHUNK_BYTES))
        query = load_vector(builder, builder.add(q, at))
        row = builder.add(keys, at)
        for slot in sums:
            key = load_vector(builder, row)
            builder.store(fma_vector(builder, query, key, builder.load(slot)), slot)
            row = builder.add(row, stride)
    return _sums(builder, [builder.load(slot) for slot in sums])


def _add_weighted(builder: Any, weights: Any, values: Any, stride: Any, out: Any, width: int) -> None:
    """out += sum of weight * value over 16 tokens, `width` chunks at once; even and odd tokens apart."""
    at = [_word(_CHUNK_BYTES * i) for i in range(width)]
    zero = ir.Constant(_VEC, None)
    even = [load_vector(builder, builder.add(out, a)) for a in at]
    odd = [zero] * width
    row = values
    for token in range(LANES):
        pointer = builder.inttoptr(builder.add(weights, _word(4 * token)), ir.FloatType().as_pointer())
        weight = splat(builder, builder.load(pointer, typ=ir.FloatType(), align=4))
        chain = odd if token % 2 else even
        for i, a in enumerate(at):
            chain[i] = fma_vector(builder, weight, load_vector(builder, builder.add(row, a)), chain[i])
        row = builder.add(row, stride)
    for i, a in enumerate(at):
        pointer = builder.inttoptr(builder.add(out, a), _VEC.as_pointer())
        builder.store(builder.fadd(even[i], odd[i]), pointer, align=4)


@_instruction(types.void, types.intp, types.intp, types.intp, types.intp)
def add_weighted_1(builder: Any, weights: Any, values: Any, stride: Any, out: Any) -> None:
    _add_weighted(builder, weights, values, stride, out, 1)


@_instruction(types.void, types.intp, types.intp, types.intp, types.intp)
def add_weighted_2(builder: Any, weights: Any, values: Any, stride: Any, out: Any) -> None:
    _add_weighted(builder, weights, values, stride, out, 2)


@_instruction(types.void, types.intp, types.intp, types.intp, types.intp)
def add_weighted_4(builder: Any, weights: Any, values: Any, stride: Any, out: Any) -> None:
    _add_weighted(builder, weights, values, stride, out, 4)
