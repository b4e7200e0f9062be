"""Arithmetic on vectors of 16 float32, for numba code: + - * / and what is here."""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import lower_builtin

from ellm.kernels.jit_ir import (
    FLOAT,
    I32,
    IVEC,
    LANES,
    VEC,
    Emit,
    call,
    fma_vector,
    instruction,
    lanes_below,
    splat,
    vector,
)


@instruction(vector, types.float32)
def spread(builder: Any, value: Any) -> Any:
    """One value in all lanes."""
    return splat(builder, value)


@instruction(vector)
def lane_numbers(builder: Any) -> Any:
    """0 to 15."""
    return ir.Constant(VEC, [float(i) for i in range(LANES)])


@instruction(vector, vector, vector, vector)
def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    return fma_vector(builder, a, b, c)


@instruction(vector, vector, vector)
def larger(builder: Any, a: Any, b: Any) -> Any:
    """Lane by lane; b where either is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@instruction(vector, vector, vector)
def smaller(builder: Any, a: Any, b: Any) -> Any:
    """Lane by lane; b where either is NaN."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


@instruction(vector, vector)
def nearest(builder: Any, a: Any) -> Any:
    """Round each lane to an integer, ties to even."""
    return call(builder, "llvm.roundeven.v16f32", VEC, a)


@instruction(vector, vector, vector)
def times_power_of_two(builder: Any, a: Any, n: Any) -> Any:
    """a * 2^n for whole n, where a and the result are normal numbers."""
    exponent = builder.shl(builder.fptosi(n, IVEC), ir.Constant(IVEC, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(a, IVEC), exponent), VEC)


@instruction(vector, vector, vector, vector, vector)
def where_less(builder: Any, a: Any, b: Any, then: Any, other: Any) -> Any:
    """Lane by lane: `then` where a < b, else `other`."""
    return builder.select(builder.fcmp_ordered("<", a, b), then, other)


@instruction(vector, vector, types.intp, types.intp, types.float32)
def keep_lanes(builder: Any, a: Any, first: Any, last: Any, other: Any) -> Any:
    """Lanes in [first, last) of a, `other` elsewhere."""
    below = lanes_below(builder, last)
    before = lanes_below(builder, first)
    return builder.select(builder.and_(below, builder.not_(before)), a, splat(builder, other))


def _fold(builder: Any, value: Any, join: Emit) -> Any:
    """Join all lanes in a fixed tree: halves, quarters, and so on."""
    width = LANES
    while width > 1:
        width //= 2
        lanes = ir.VectorType(I32, width)
        low = builder.shuffle_vector(value, value, ir.Constant(lanes, list(range(width))))
        high = builder.shuffle_vector(value, value, ir.Constant(lanes, list(range(width, 2 * width))))
        value = join(low, high)
    return builder.extract_element(value, ir.Constant(I32, 0))


@instruction(types.float32, vector)
def total(builder: Any, a: Any) -> Any:
    """The sum of the lanes."""
    return _fold(builder, a, builder.fadd)


@instruction(types.float32, vector)
def peak(builder: Any, a: Any) -> Any:
    """The largest lane."""
    return _fold(builder, a, lambda x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))


@instruction(types.float32, types.intp)
def float_from_bits(builder: Any, bits: Any) -> Any:
    """The float32 whose bits are the low half of a word."""
    return builder.bitcast(builder.trunc(bits, I32), FLOAT)


def _arithmetic(symbol: Any, method: str) -> None:
    @infer_global(symbol)
    class _Typing(ConcreteTemplate):
        cases = [signature(vector, vector, vector)]  # noqa: RUF012

    @lower_builtin(symbol, vector, vector)
    def _lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, method)(*args)


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")
