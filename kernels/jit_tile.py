"""The two inner products of attention, on 16 tokens at a time.

Both do one query vector's arithmetic in one fixed order, whatever else is computed beside it. Keys and values
are float32, padded with zeros to 16 dimensions, or bfloat16 of 32 dimensions at a time.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from ellm.kernels.jit_ir import LANES, fma_vector, instruction, load_vector, narrow_bf16, splat, vector

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_VEC = ir.VectorType(ir.FloatType(), LANES)
_IVEC = ir.VectorType(_I32, LANES)
_STEP_BYTES = 64  # of a vector, and of a key or value at a step


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


def _read(builder: Any, address: Any, paired: bool) -> list[Any]:
    """The next vectors of a row: 16 floats, or 32 bfloat16 as their even and their odd elements.

    A bfloat16 is the upper half of a float32, so a shift and a mask part them without a shuffle.
    """
    if not paired:
        return [load_vector(builder, address)]
    words = load_vector(builder, address, _I32)
    shift, mask = (ir.Constant(_IVEC, [number] * LANES) for number in (16, 0xFFFF0000))
    return [builder.bitcast(bits, _VEC) for bits in (builder.shl(words, shift), builder.and_(words, mask))]


def _scores(builder: Any, q: Any, keys: Any, stride: Any, steps: Any, paired: bool) -> Any:
    """q . k of 16 keys, `stride` bytes apart: 64 bytes of a key at a step, then over the lanes."""
    sums = [cgutils.alloca_once_value(builder, ir.Constant(_VEC, None)) for _ in range(LANES)]
    vectors = 2 if paired else 1
    with cgutils.for_range(builder, steps) as loop:
        at = builder.mul(loop.index, _word(_STEP_BYTES))
        start = builder.add(q, builder.mul(at, _word(vectors)))
        query = [load_vector(builder, builder.add(start, _word(_STEP_BYTES * i))) for i in range(vectors)]
        row = builder.add(keys, at)
        for slot in sums:
            added = builder.load(slot)
            for i, key in enumerate(_read(builder, row, paired)):
                added = fma_vector(builder, query[i], key, added)
            builder.store(added, slot)
            row = builder.add(row, stride)
    return _sums(builder, [builder.load(slot) for slot in sums])


def _add_weighted(
    builder: Any, weights: Any, values: Any, stride: Any, out: Any, steps: int, paired: bool
) -> None:
    """out += sum of weight * value over 16 tokens, 64 * `steps` bytes of a value at once.

    Even and odd tokens are summed apart and `out` is added last, so that no chain of additions is long.
    """
    count = steps * (2 if paired else 1)
    chains = [[ir.Constant(_VEC, None)] * count, [ir.Constant(_VEC, None)] * count]
    row = values
    for token in range(LANES):
        pointer = builder.inttoptr(builder.add(weights, _word(4 * token)), ir.FloatType().as_pointer())
        weight = splat(builder, builder.load(pointer, typ=ir.FloatType(), align=4))
        chain = chains[token % 2]
        value = [v for i in range(steps) for v in _read(builder, builder.add(row, _word(64 * i)), paired)]
        for i, v in enumerate(value):
            chain[i] = fma_vector(builder, weight, v, chain[i])
        row = builder.add(row, stride)
    for i in range(count):
        at = builder.add(out, _word(_STEP_BYTES * i))
        added = builder.fadd(load_vector(builder, at), builder.fadd(chains[0][i], chains[1][i]))
        builder.store(added, builder.inttoptr(at, _VEC.as_pointer()), align=4)


@instruction(vector, types.intp, types.intp, types.intp, types.intp)
def scores_f32(builder: Any, q: Any, keys: Any, stride: Any, steps: Any) -> Any:
    """q . k of 16 float32 keys."""
    return _scores(builder, q, keys, stride, steps, paired=False)


@instruction(vector, types.intp, types.intp, types.intp, types.intp)
def scores_bf16(builder: Any, q: Any, keys: Any, stride: Any, steps: Any) -> Any:
    """q . k of 16 bfloat16 keys; q is float32, in 16 even and 16 odd elements at a time."""
    return _scores(builder, q, keys, stride, steps, paired=True)


@instruction(types.void, types.intp, types.intp, types.intp, types.intp)
def add_weighted_f32_1(builder: Any, weights: Any, values: Any, stride: Any, out: Any) -> None:
    """One step of float32 values."""
    _add_weighted(builder, weights, values, stride, out, 1, paired=False)


@instruction(types.void, types.intp, types.intp, types.intp, types.intp)
def add_weighted_f32_4(builder: Any, weights: Any, values: Any, stride: Any, out: Any) -> None:
    """Four steps of float32 values."""
    _add_weighted(builder, weights, values, stride, out, 4, paired=False)


@instruction(types.void, types.intp, types.intp, types.intp, types.intp)
def add_weighted_bf16_1(builder: Any, weights: Any, values: Any, stride: Any, out: Any) -> None:
    """One step of bfloat16 values; out in even and odd elements."""
    _add_weighted(builder, weights, values, stride, out, 1, paired=True)


@instruction(types.void, types.intp, types.intp, types.intp, types.intp)
def add_weighted_bf16_2(builder: Any, weights: Any, values: Any, stride: Any, out: Any) -> None:
    """Two steps of bfloat16 values; out in even and odd elements."""
    _add_weighted(builder, weights, values, stride, out, 2, paired=True)


@instruction(types.void, types.intp, types.intp, types.float32)
def split_bf16(builder: Any, target: Any, source: Any, scale: Any) -> None:
    """32 bfloat16 -> 16 even, then 16 odd ones as float32, times `scale`."""
    for i, v in enumerate(_read(builder, source, paired=True)):
        pointer = builder.inttoptr(builder.add(target, _word(_STEP_BYTES * i)), _VEC.as_pointer())
        builder.store(builder.fmul(v, splat(builder, scale)), pointer, align=4)


@instruction(types.void, types.intp, vector, vector)
def store_interleaved_bf16(builder: Any, target: Any, even: Any, odd: Any) -> None:
    """The inverse of `split_bf16`."""
    low, high = (builder.zext(narrow_bf16(builder, v), _IVEC) for v in (even, odd))
    words = builder.or_(low, builder.shl(high, ir.Constant(_IVEC, [16] * LANES)))
    builder.store(words, builder.inttoptr(target, _IVEC.as_pointer()), align=2)
