"""Memory by plain addresses, for numba code. Nothing checks an address: callers validate tensors first.

`kind` is the type of the elements in memory; in registers they are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir
from numba.core import types

from ellm.kernels.jit_ir import (
    FLOAT,
    I32,
    LANES,
    VEC,
    call,
    inline,
    instruction,
    lanes_below,
    load_vector,
    narrow_bf16,
    pointer_to,
    vector,
    widen_bf16,
)

DOUBLE = ir.DoubleType()
F32, BF16, F16 = 0, 1, 2
KINDS = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}
HEADER = 2  # words of a kernel's block before its arguments: see `jit_launch`


def _load_masked(builder: Any, address: Any, count: Any, element: Any, suffix: str) -> Any:
    kind = ir.VectorType(element, LANES)
    pointer = pointer_to(builder, address, kind)
    mask = lanes_below(builder, count)
    zero = ir.Constant(kind, None)
    return call(builder, f"llvm.masked.load.{suffix}.p0", kind, pointer, mask, zero)


def _store_masked(builder: Any, address: Any, value: Any, count: Any, suffix: str) -> None:
    pointer = pointer_to(builder, address, value.type)
    mask = lanes_below(builder, count)
    call(builder, f"llvm.masked.store.{suffix}.p0", ir.VoidType(), value, pointer, mask)


@instruction(vector, types.intp)
def load_f32(builder: Any, address: Any) -> Any:
    return load_vector(builder, address)


@instruction(vector, types.intp)
def load_bf16(builder: Any, address: Any) -> Any:
    return widen_bf16(builder, load_vector(builder, address, ir.IntType(16)))


@instruction(vector, types.intp)
def load_f16(builder: Any, address: Any) -> Any:
    return builder.fpext(load_vector(builder, address, ir.HalfType()), VEC)


@instruction(vector, types.intp, types.intp)
def load_f32_part(builder: Any, address: Any, count: Any) -> Any:
    return _load_masked(builder, address, count, FLOAT, "v16f32")


@instruction(vector, types.intp, types.intp)
def load_bf16_part(builder: Any, address: Any, count: Any) -> Any:
    return widen_bf16(builder, _load_masked(builder, address, count, ir.IntType(16), "v16i16"))


@instruction(vector, types.intp, types.intp)
def load_f16_part(builder: Any, address: Any, count: Any) -> Any:
    return builder.fpext(_load_masked(builder, address, count, ir.HalfType(), "v16f16"), VEC)


@instruction(types.void, types.intp, vector)
def store_f32(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, pointer_to(builder, address, VEC), align=1)


@instruction(types.void, types.intp, vector)
def store_bf16(builder: Any, address: Any, value: Any) -> None:
    narrow = narrow_bf16(builder, value)
    builder.store(narrow, pointer_to(builder, address, narrow.type), align=1)


@instruction(types.void, types.intp, vector)
def store_f16(builder: Any, address: Any, value: Any) -> None:
    narrow = builder.fptrunc(value, ir.VectorType(ir.HalfType(), LANES))
    builder.store(narrow, pointer_to(builder, address, narrow.type), align=1)


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


@instruction(types.intp, types.intp)
def load_i64(builder: Any, address: Any) -> Any:
    word = ir.IntType(64)
    return builder.load(pointer_to(builder, address, word), typ=word, align=1)


@instruction(types.intp, types.intp)
def load_i32(builder: Any, address: Any) -> Any:
    value = builder.load(pointer_to(builder, address, I32), typ=I32, align=1)
    return builder.sext(value, ir.IntType(64))


@instruction(types.float32, types.intp)
def load_float(builder: Any, address: Any) -> Any:
    return builder.load(pointer_to(builder, address, FLOAT), typ=FLOAT, align=1)


@instruction(types.float64, types.intp)
def load_double(builder: Any, address: Any) -> Any:
    return builder.load(pointer_to(builder, address, DOUBLE), typ=DOUBLE, align=1)


@instruction(types.void, types.intp, types.float64)
def store_double(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, pointer_to(builder, address, DOUBLE), align=1)


@instruction(types.void, types.intp, types.float32)
def store_float(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, pointer_to(builder, address, FLOAT), align=1)


@instruction(types.void, types.intp, types.intp)
def store_i64(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, pointer_to(builder, address, ir.IntType(64)), align=1)


@instruction(types.intp, types.intp, types.intp)
def fetch_add(builder: Any, address: Any, amount: Any) -> Any:
    """Add to a shared 64-bit counter; returns what it was."""
    return builder.atomic_rmw("add", pointer_to(builder, address, ir.IntType(64)), amount, "seq_cst")


@instruction(types.void, types.intp, types.intp, types.intp)
def copy_bytes(builder: Any, target: Any, source: Any, count: Any) -> None:
    byte = ir.IntType(8)
    pointers = [pointer_to(builder, a, byte) for a in (target, source)]
    volatile = ir.Constant(ir.IntType(1), 0)
    call(builder, "llvm.memcpy.p0.p0.i64", ir.VoidType(), *pointers, count, volatile)


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
def word(block, index):
    """Argument `index` of a kernel's block."""
    return load_i64(block + 8 * (HEADER + index))
