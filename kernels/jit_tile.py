"""The two inner products of attention, on 16 tokens at a time.

Both do one query vector's arithmetic in one fixed order, whatever else is computed beside it. Keys and values
are float32, padded with zeros to 16 dimensions, or bfloat16 of 32 dimensions at a time.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils, types

from ellm.kernels.jit_ir import LANES, ask, fma_vector, instruction, load_vector, narrow_bf16, splat, vector

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_VEC = ir.VectorType(ir.FloatType(), LANES)
_IVEC = ir.VectorType(_I32, LANES)
TILE = 64  # tokens between two updates of the running maximum
TILE_BYTES = 4 * TILE  # of a query's scores or weights
_STEP_BYTES = 64  # of a vector, and of a key or value at a step


def _sums_at_once() -> int:
    """How many sums are kept at once, which changes none of them: vectors that fill a processor's registers.
    AVX2 has 16 of half a vector (measured: docs/decisions/0010), AVX-512 32 of a whole one, NEON 32 of a
    quarter."""
    features = get_host_cpu_features()
    return 4 if features.get("avx2") and not features.get("avx512f") else 16


_SUMS = _sums_at_once()


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
    """8 vectors -> their sums over some lanes, which `_join_halves` finishes; cheap shuffles only."""
    first, second = _per_quad([0, 4, 1, 5]), _per_quad([2, 6, 3, 7])
    v = [_join(builder, v[i], v[i + 1], first, second) for i in range(0, 8, 2)]
    first, second = _per_quad([0, 1, 4, 5]), _per_quad([2, 3, 6, 7])
    v = [_join(builder, v[i], v[i + 1], first, second) for i in range(0, 4, 2)]
    return _join(builder, v[0], v[1], _per_lane([0, 1, 4, 5]), _per_lane([2, 3, 6, 7]))


def _join_halves(builder: Any, first: Any, second: Any) -> Any:
    """The sums of 16 vectors from those of 8 and 8."""
    return _join(builder, first, second, _per_lane([0, 2, 4, 6]), _per_lane([1, 3, 5, 7]))


def _read(builder: Any, address: Any, paired: bool) -> list[Any]:
    """The next vectors of a row: 16 floats, or 32 bfloat16 as their even and their odd elements.

    A bfloat16 is the upper half of a float32, so a shift and a mask part them without a shuffle.
    """
    if not paired:
        return [load_vector(builder, address)]
    words = load_vector(builder, address, _I32)
    shift, mask = (ir.Constant(_IVEC, [number] * LANES) for number in (16, 0xFFFF0000))
    return [builder.bitcast(bits, _VEC) for bits in (builder.shl(words, shift), builder.and_(words, mask))]


class _Ahead:
    """What follows in memory, of which a function asks for a line whenever it reads one: from `address` on,
    `pace` bytes apart. With no address nothing is asked for."""

    def __init__(self, builder: Any, address: Any = None, pace: Any = None) -> None:
        self._builder, self._address, self._pace = builder, address, pace

    def after(self, lines: Any) -> _Ahead:
        if self._address is None:
            return self
        skipped = self._builder.mul(self._pace, lines)
        return _Ahead(self._builder, self._builder.add(self._address, skipped), self._pace)

    def ask(self) -> None:
        if self._address is not None:
            ask(self._builder, self._address)


def _half_scores(
    builder: Any,
    queries: list[Any],
    keys: Any,
    stride: Any,
    steps: Any,
    paired: bool,
    most: int,
    ahead: _Ahead,
) -> Any:
    """For each query the sums of 8 keys: 64 bytes of a key at a step, then within four lanes."""
    slots = [[cgutils.alloca_once_value(builder, ir.Constant(_VEC, None)) for _ in range(8)] for _ in queries]
    vectors = 2 if paired else 1
    at_once = min(8, most // len(queries))
    for first in range(0, 8, at_once):
        with cgutils.for_range(builder, steps) as loop:
            at = builder.mul(loop.index, _word(_STEP_BYTES))
            parts = [
                [
                    load_vector(
                        builder, builder.add(q, builder.add(builder.mul(at, _word(vectors)), _word(64 * i)))
                    )
                    for i in range(vectors)
                ]
                for q in queries
            ]
            row = builder.add(builder.add(keys, at), builder.mul(stride, _word(first)))
            later = ahead.after(
                builder.add(builder.mul(steps, _word(first)), builder.mul(loop.index, _word(at_once)))
            )
            for token in range(first, first + at_once):
                later.after(_word(token - first)).ask()
                for i, key in enumerate(_read(builder, row, paired)):
                    for part, sums in zip(parts, slots, strict=True):
                        value = fma_vector(builder, part[i], key, builder.load(sums[token]))
                        builder.store(value, sums[token])
                row = builder.add(row, stride)
    return [_sums(builder, [builder.load(slot) for slot in sums]) for sums in slots]


def _scores(paired: bool, count: int, most: int = _SUMS, asks: bool = False) -> Any:
    """(q, gap, keys, stride, steps, out): q . k of 16 keys, `stride` bytes apart, to 16 floats at `out`.

    With `count` 2 also for a second query, `gap` bytes after the first, to TILE_BYTES after `out`: a key is
    loaded once for both. If it `asks`, (..., ahead, pace): see `_Ahead`.
    """

    def emit(
        builder: Any, q: Any, gap: Any, keys: Any, stride: Any, steps: Any, out: Any, *later: Any
    ) -> None:
        queries = [q, builder.add(q, gap)][:count]
        # All 16 keys at once would take 32 registers for two queries.
        halves = []
        for first in (0, 8):
            k = builder.add(keys, builder.mul(stride, _word(first)))
            ahead = _Ahead(builder, *later).after(builder.mul(steps, _word(first)))
            halves.append(_half_scores(builder, queries, k, stride, steps, paired, most, ahead))
        for i, pair in enumerate(zip(*halves, strict=True)):
            target = builder.inttoptr(builder.add(out, _word(TILE_BYTES * i)), _VEC.as_pointer())
            builder.store(_join_halves(builder, *pair), target, align=4)

    return instruction(types.void, *[types.intp] * (8 if asks else 6))(emit)


def _add_weighted(paired: bool, count: int, steps: int, most: int = _SUMS, asks: bool = False) -> Any:
    """(weights, values, stride, out, gap): out += weight * value over 16 tokens, of 64 * steps bytes each.

    Even and odd tokens are summed apart and `out` is added last, so that no chain of additions is long. With
    `count` 2 also for a second output, `gap` bytes after the first, whose weights lie TILE_BYTES on. If it
    `asks`, (..., ahead, pace): see `_Ahead`.
    """

    def emit(builder: Any, weights: Any, values: Any, stride: Any, out: Any, gap: Any, *later: Any) -> None:
        per_step, ahead = 2 if paired else 1, _Ahead(builder, *later)
        at_once = max(1, most // (2 * count * per_step))  # steps
        for first in range(0, steps, at_once):
            some = range(first, min(first + at_once, steps))
            chains = [
                [[ir.Constant(_VEC, None)] * (len(some) * per_step) for _ in range(2)] for _ in range(count)
            ]
            row = values
            for token in range(LANES):
                parts = [builder.add(row, _word(_STEP_BYTES * i)) for i in some]
                value = [v for part in parts for v in _read(builder, part, paired)]
                for _ in some:
                    ahead.ask()
                    ahead = ahead.after(_word(1))
                for which in range(count):
                    address = builder.add(weights, _word(TILE_BYTES * which + 4 * token))
                    pointer = builder.inttoptr(address, ir.FloatType().as_pointer())
                    weight = splat(builder, builder.load(pointer, typ=ir.FloatType(), align=4))
                    chain = chains[which][token % 2]
                    chain[:] = [fma_vector(builder, weight, v, c) for v, c in zip(value, chain, strict=True)]
                row = builder.add(row, stride)
            for target, (even, odd) in zip((out, builder.add(out, gap)), chains, strict=False):
                for i, pair in enumerate(zip(even, odd, strict=True)):
                    at = builder.add(target, _word(_STEP_BYTES * (first * per_step + i)))
                    added = builder.fadd(load_vector(builder, at), builder.fadd(*pair))
                    builder.store(added, builder.inttoptr(at, _VEC.as_pointer()), align=4)

    return instruction(types.void, *[types.intp] * (7 if asks else 5))(emit)


scores_f32, scores_f32_twice = _scores(False, 1), _scores(False, 2)
scores_bf16, scores_bf16_twice = _scores(True, 1), _scores(True, 2)
scores_f32_ahead, scores_f32_twice_ahead = _scores(False, 1, asks=True), _scores(False, 2, asks=True)
scores_bf16_ahead, scores_bf16_twice_ahead = _scores(True, 1, asks=True), _scores(True, 2, asks=True)
add_weighted_f32, add_weighted_f32_twice = _add_weighted(False, 1, 1), _add_weighted(False, 2, 1)
add_weighted_f32_4, add_weighted_f32_4_twice = _add_weighted(False, 1, 4), _add_weighted(False, 2, 4)
add_weighted_f32_4_ahead = _add_weighted(False, 1, 4, asks=True)
add_weighted_f32_4_twice_ahead = _add_weighted(False, 2, 4, asks=True)
add_weighted_bf16, add_weighted_bf16_twice = _add_weighted(True, 1, 1), _add_weighted(True, 2, 1)
add_weighted_bf16_2, add_weighted_bf16_2_twice = _add_weighted(True, 1, 2), _add_weighted(True, 2, 2)
add_weighted_bf16_2_ahead = _add_weighted(True, 1, 2, asks=True)
add_weighted_bf16_2_twice_ahead = _add_weighted(True, 2, 2, asks=True)


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
