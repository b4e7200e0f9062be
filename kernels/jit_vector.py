"""Vectors of 16 floats inside numba functions, on plain addresses.

numba leaves vectorising to LLVM, which splits a loop into a wide body and a scalar tail: two orders of
arithmetic for one row. Here the vector is explicit, so a row's arithmetic is what the source says, on any
machine (LLVM cuts 16 lanes into what the CPU has: one AVX-512 register, two AVX2, four NEON). Nothing checks
an address: callers validate tensors first. `kind` is the element type in memory; arithmetic is in float32.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model

LANES = 16
F32, BF16, F16 = 0, 1, 2
KINDS = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}

_I32 = ir.IntType(32)
_F32 = ir.FloatType()
_VEC = ir.VectorType(_F32, LANES)
_IVEC = ir.VectorType(_I32, LANES)
_MASK = ir.VectorType(ir.IntType(1), LANES)
_INDEX = ir.Constant(_IVEC, list(range(LANES)))


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="f32x16")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _VEC)


Emit = Callable[..., Any]  # (builder, *values) -> value


def instruction(result: Any, *arguments: Any) -> Callable[[Emit], Any]:
    """A function of fixed numba types whose body is what `emit` builds; for numba code only."""

    def decorate(emit: Emit) -> Any:
        def function(*values: Any) -> Any:
            raise TypeError(f"{emit.__name__} exists in compiled code only")

        class _Typing(ConcreteTemplate):
            key = function
            cases = [signature(result, *arguments)]  # noqa: RUF012

        infer_global(function, types.Function(_Typing))

        @lower_builtin(function, *arguments)
        def _lower(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            out = emit(builder, *values)
            return context.get_dummy_value() if result is types.void else out

        functools.update_wrapper(function, emit)
        return function

    return decorate


def _pointer(builder: Any, address: Any, pointee: Any) -> Any:
    return builder.inttoptr(address, pointee.as_pointer())


def _call(builder: Any, name: str, result: Any, *values: Any) -> Any:
    function_type = ir.FunctionType(result, [v.type for v in values])
    module = builder.module
    function = module.globals.get(name)
    if function is None:
        function = ir.Function(module, function_type, name)
    return builder.call(function, values)


def splat(builder: Any, value: Any) -> Any:
    """IR: all lanes of a vector from one scalar."""
    kind = ir.VectorType(value.type, LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(_IVEC, [0] * LANES))


def load_vector(builder: Any, address: Any, element: Any = _F32) -> Any:
    """IR: LANES elements from any address."""
    kind = ir.VectorType(element, LANES)
    return builder.load(_pointer(builder, address, kind), typ=kind, align=1)


def fma_vector(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """IR: a * b + c, rounded once."""
    return _call(builder, "llvm.fma.v16f32", _VEC, a, b, c)


def _lanes_below(builder: Any, count: Any) -> Any:
    limit = splat(builder, builder.trunc(count, _I32))
    return builder.icmp_signed("<", _INDEX, limit)


def _load_masked(builder: Any, address: Any, count: Any, element: Any, suffix: str) -> Any:
    kind = ir.VectorType(element, LANES)
    pointer = _pointer(builder, address, kind)
    mask = _lanes_below(builder, count)
    zero = ir.Constant(kind, None)
    return _call(builder, f"llvm.masked.load.{suffix}.p0", kind, pointer, mask, zero)


def _store_masked(builder: Any, address: Any, value: Any, count: Any, suffix: str) -> None:
    pointer = _pointer(builder, address, value.type)
    mask = _lanes_below(builder, count)
    _call(builder, f"llvm.masked.store.{suffix}.p0", ir.VoidType(), value, pointer, mask)


def _widen_bf16(builder: Any, bits: Any) -> Any:
    shift = ir.Constant(_IVEC, [16] * LANES)
    return builder.bitcast(builder.shl(builder.zext(bits, _IVEC), shift), _VEC)


def narrow_bf16(builder: Any, value: Any) -> Any:
    """IR: round to nearest, ties to even; a NaN stays a (quiet) NaN."""

    def constant(number: int) -> Any:
        return ir.Constant(_IVEC, [number] * LANES)

    bits = builder.bitcast(value, _IVEC)
    last = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(builder.add(bits, last), constant(0x7FFF))
    quiet = builder.or_(bits, constant(0x400000))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(chosen, constant(16)), ir.VectorType(ir.IntType(16), LANES))


@instruction(vector, types.intp)
def load_f32(builder: Any, address: Any) -> Any:
    return load_vector(builder, address)


@instruction(vector, types.intp)
def load_bf16(builder: Any, address: Any) -> Any:
    return _widen_bf16(builder, load_vector(builder, address, ir.IntType(16)))


@instruction(vector, types.intp)
def load_f16(builder: Any, address: Any) -> Any:
    return builder.fpext(load_vector(builder, address, ir.HalfType()), _VEC)


@instruction(vector, types.intp, types.intp)
def load_f32_part(builder: Any, address: Any, count: Any) -> Any:
    return _load_masked(builder, address, count, _F32, "v16f32")


@instruction(vector, types.intp, types.intp)
def load_bf16_part(builder: Any, address: Any, count: Any) -> Any:
    return _widen_bf16(builder, _load_masked(builder, address, count, ir.IntType(16), "v16i16"))


@instruction(vector, types.intp, types.intp)
def load_f16_part(builder: Any, address: Any, count: Any) -> Any:
    return builder.fpext(_load_masked(builder, address, count, ir.HalfType(), "v16f16"), _VEC)


@instruction(types.void, types.intp, vector)
def store_f32(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, _pointer(builder, address, _VEC), align=1)


@instruction(types.void, types.intp, vector)
def store_bf16(builder: Any, address: Any, value: Any) -> None:
    narrow = narrow_bf16(builder, value)
    builder.store(narrow, _pointer(builder, address, narrow.type), align=1)


@instruction(types.void, types.intp, vector)
def store_f16(builder: Any, address: Any, value: Any) -> None:
    narrow = builder.fptrunc(value, ir.VectorType(ir.HalfType(), LANES))
    builder.store(narrow, _pointer(builder, address, narrow.type), align=1)


@instruction(types.void, types.intp, vector, types.intp)
def store_f32_part(builder: Any, address: Any, value: Any, count: Any) -> None:
    _store_masked(builder, address, value, count, "v16f32")


@instruction(types.void, types.intp, vector, types.intp)
def store_bf16_part(builder: Any, address: Any, value: Any, count: Any) -> None:
    _store_masked(builder, address, narrow_bf16(builder, value), count, "v16i16")


@instruction(types.void, types.intp, vector, types.intp)
def store_f16_part(builder: Any, address: Any, value: Any, count: Any) -> None:
    narrow = builder.fptrunc(value, ir.VectorType(ir.HalfType(), LANES))
    _store_masked(builder, address, narrow, count, "v16f16")


@instruction(vector, vector)
def round_bf16(builder: Any, value: Any) -> Any:
    """The nearest bfloat16 of each lane."""
    return _widen_bf16(builder, narrow_bf16(builder, value))


@instruction(vector, vector)
def round_f16(builder: Any, value: Any) -> Any:
    """The nearest float16 of each lane."""
    return builder.fpext(builder.fptrunc(value, ir.VectorType(ir.HalfType(), LANES)), _VEC)


@instruction(vector, types.float32)
def spread(builder: Any, value: Any) -> Any:
    """One value in all lanes."""
    return splat(builder, value)


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
    return _call(builder, "llvm.roundeven.v16f32", _VEC, a)


@instruction(vector, vector, vector)
def times_power_of_two(builder: Any, a: Any, n: Any) -> Any:
    """a * 2^n for whole n, where a and the result are normal numbers."""
    exponent = builder.shl(builder.fptosi(n, _IVEC), ir.Constant(_IVEC, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(a, _IVEC), exponent), _VEC)


@instruction(vector, vector, vector, vector, vector)
def where_less(builder: Any, a: Any, b: Any, then: Any, other: Any) -> Any:
    """Lane by lane: `then` where a < b, else `other`."""
    return builder.select(builder.fcmp_ordered("<", a, b), then, other)


@instruction(vector, vector, types.intp, types.intp, types.float32)
def keep_lanes(builder: Any, a: Any, first: Any, last: Any, other: Any) -> Any:
    """Lanes in [first, last) of a, `other` elsewhere."""
    below = _lanes_below(builder, last)
    before = _lanes_below(builder, first)
    return builder.select(builder.and_(below, builder.not_(before)), a, splat(builder, other))


def _fold(builder: Any, value: Any, join: Emit) -> Any:
    """Join all lanes in a fixed tree: halves, quarters, and so on."""
    width = LANES
    while width > 1:
        width //= 2
        lanes = ir.VectorType(_I32, width)
        low = builder.shuffle_vector(value, value, ir.Constant(lanes, list(range(width))))
        high = builder.shuffle_vector(value, value, ir.Constant(lanes, list(range(width, 2 * width))))
        value = join(low, high)
    return builder.extract_element(value, ir.Constant(_I32, 0))


@instruction(types.float32, vector)
def total(builder: Any, a: Any) -> Any:
    """The sum of the lanes."""
    return _fold(builder, a, builder.fadd)


@instruction(types.float32, vector)
def peak(builder: Any, a: Any) -> Any:
    """The largest lane."""
    return _fold(builder, a, lambda x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))


@instruction(types.intp, types.intp)
def load_i64(builder: Any, address: Any) -> Any:
    word = ir.IntType(64)
    return builder.load(_pointer(builder, address, word), typ=word, align=1)


@instruction(types.intp, types.intp)
def load_i32(builder: Any, address: Any) -> Any:
    value = builder.load(_pointer(builder, address, _I32), typ=_I32, align=1)
    return builder.sext(value, ir.IntType(64))


@instruction(types.float32, types.intp)
def load_float(builder: Any, address: Any) -> Any:
    return builder.load(_pointer(builder, address, _F32), typ=_F32, align=1)


@instruction(types.void, types.intp, types.float32)
def store_float(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, _pointer(builder, address, _F32), align=1)


@instruction(types.void, types.intp, types.intp)
def store_i64(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, _pointer(builder, address, ir.IntType(64)), align=1)


@instruction(types.float32, types.intp)
def float_from_bits(builder: Any, bits: Any) -> Any:
    """The float32 whose bits are the low half of a word."""
    return builder.bitcast(builder.trunc(bits, _I32), _F32)


@instruction(types.intp, types.intp, types.intp)
def fetch_add(builder: Any, address: Any, amount: Any) -> Any:
    """Add to a shared 64-bit counter; returns what it was."""
    return builder.atomic_rmw("add", _pointer(builder, address, ir.IntType(64)), amount, "seq_cst")


@instruction(types.void, types.intp, types.intp, types.intp)
def copy_bytes(builder: Any, target: Any, source: Any, count: Any) -> None:
    byte = ir.IntType(8)
    pointers = [_pointer(builder, a, byte) for a in (target, source)]
    volatile = ir.Constant(ir.IntType(1), 0)
    _call(builder, "llvm.memcpy.p0.p0.i64", ir.VoidType(), *pointers, count, volatile)


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

inline = njit(forceinline=True, error_model="numpy")


@inline
def item_size(kind):
    """Bytes of an element."""
    return 4 if kind == F32 else 2


@inline
def load(kind, address):
    """16 elements at an address."""
    if kind == F32:
        return load_f32(address)
    if kind == BF16:
        return load_bf16(address)
    return load_f16(address)


@inline
def load_part(kind, address, count):
    """The first `count` elements at an address, at most 16; zeros after."""
    if count >= LANES:  # a mask costs, and without AVX-512 it costs a lot
        return load(kind, address)
    if kind == F32:
        return load_f32_part(address, count)
    if kind == BF16:
        return load_bf16_part(address, count)
    return load_f16_part(address, count)


@inline
def store(kind, address, value):
    """16 lanes to an address, rounded to nearest even."""
    if kind == F32:
        store_f32(address, value)
    elif kind == BF16:
        store_bf16(address, value)
    else:
        store_f16(address, value)


@inline
def store_part(kind, address, value, count):
    """The first `count` lanes to an address, at most 16, rounded to nearest even."""
    if count >= LANES:
        store(kind, address, value)
    elif kind == F32:
        store_f32_part(address, value, count)
    elif kind == BF16:
        store_bf16_part(address, value, count)
    else:
        store_f16_part(address, value, count)


@inline
def rounded(kind, value):
    """What a value becomes when it is stored and loaded again."""
    if kind == BF16:
        return round_bf16(value)
    if kind == F16:
        return round_f16(value)
    return value
