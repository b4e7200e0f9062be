"""LLVM's vectors as a numba type, and functions whose body is written in LLVM's own language.

numba leaves vectorising to LLVM, which splits a loop into a wide body and a scalar tail: two orders of
arithmetic for one row. Here the vector is explicit, 16 floats, so a row's arithmetic is what the source says
on any machine: LLVM cuts 16 lanes into what the CPU has (one AVX-512 register, two AVX2, four NEON).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import codegen, config, types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model

LANES = 16

I32 = ir.IntType(32)
FLOAT = ir.FloatType()
VEC = ir.VectorType(FLOAT, LANES)
IVEC = ir.VectorType(I32, LANES)
INDEX = ir.Constant(IVEC, list(range(LANES)))


def compiled_for(feature: str) -> bool:
    """Whether numba compiles for a processor with this feature: an instruction of another aborts LLVM."""
    features = config.CPU_FEATURES
    if features is None:
        features = codegen.get_host_cpu_features()
    return f"+{feature}" in features.split(",")


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="f32x16")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, VEC)


class _BFloat(ir.Type):  # which llvmlite lacks
    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


PAIRS_VEC = ir.VectorType(_BFloat(), 2 * LANES)  # a pair of bfloat16 to each lane
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


def pointer_to(builder: Any, address: Any, pointee: Any) -> Any:
    return builder.inttoptr(address, pointee.as_pointer())


def call(builder: Any, name: str, result: Any, *values: Any) -> Any:
    function_type = ir.FunctionType(result, [v.type for v in values])
    module = builder.module
    function = module.globals.get(name)
    if function is None:
        function = ir.Function(module, function_type, name)
    return builder.call(function, values)


def splat(builder: Any, value: Any) -> Any:
    """IR: all lanes of a vector from one scalar."""
    kind = ir.VectorType(value.type, LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(IVEC, [0] * LANES))


def load_vector(builder: Any, address: Any, element: Any = FLOAT) -> Any:
    """IR: LANES elements from any address."""
    kind = ir.VectorType(element, LANES)
    return builder.load(pointer_to(builder, address, kind), typ=kind, align=1)


def fma_vector(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """IR: a * b + c, rounded once."""
    return call(builder, "llvm.fma.v16f32", VEC, a, b, c)


def dot_vector(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """IR, AVX512_BF16: each lane's c plus the dot product of its pairs of a and b, by two roundings in the
    order that the processor has; subnormal numbers count as zeros."""
    return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", VEC, c, a, b)


def ask(builder: Any, address: Any) -> None:
    """IR: ask for the cache line of any address, without waiting."""
    hints = [ir.Constant(I32, hint) for hint in (0, 3, 1)]  # to read; to keep near; data
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer_to(builder, address, ir.IntType(8)), *hints)


def lanes_below(builder: Any, count: Any) -> Any:
    limit = splat(builder, builder.trunc(count, I32))
    return builder.icmp_signed("<", INDEX, limit)


def widen_bf16(builder: Any, bits: Any) -> Any:
    shift = ir.Constant(IVEC, [16] * LANES)
    return builder.bitcast(builder.shl(builder.zext(bits, IVEC), shift), VEC)


def narrow_bf16(builder: Any, value: Any) -> Any:
    """IR: round to nearest, ties to even; a NaN stays a (quiet) NaN."""

    def constant(number: int) -> Any:
        return ir.Constant(IVEC, [number] * LANES)

    bits = builder.bitcast(value, IVEC)
    last = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(builder.add(bits, last), constant(0x7FFF))
    quiet = builder.or_(bits, constant(0x400000))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(chosen, constant(16)), ir.VectorType(ir.IntType(16), LANES))


inline = njit(forceinline=True, error_model="numpy")
# For a long function with one caller: part of the caller's source, so that it is not compiled twice.
merge = njit(inline="always", error_model="numpy")
