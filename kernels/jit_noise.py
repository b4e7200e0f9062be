"""The noise of `noise.py`, 16 tokens at a time: the same words."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from ellm.kernels.jit_ir import LANES, VEC, inline, instruction, pointer_to, splat, vector
from ellm.kernels.noise import GOLDEN, MIX_1, MIX_2

_I64 = ir.IntType(64)
_WORDS = ir.VectorType(_I64, LANES)
_DOUBLES = ir.VectorType(ir.DoubleType(), LANES)


def _constant(kind: Any, number: int | float) -> Any:
    return ir.Constant(kind, number) if kind == _I64 else ir.Constant(kind, [number] * LANES)


def _mix(builder: Any, x: Any) -> Any:
    """splitmix64's finaliser on a word or a vector of words."""
    for shift, factor in ((30, MIX_1), (27, MIX_2)):
        x = builder.xor(x, builder.lshr(x, _constant(x.type, shift)))
        x = builder.mul(x, _constant(x.type, factor))
    return builder.xor(x, builder.lshr(x, _constant(x.type, 31)))


@instruction(types.intp, types.intp, types.intp, types.intp)
def row_key(builder: Any, seed: Any, choice_index: Any, output_index: Any) -> Any:
    """The key of a row's noise."""
    golden = _constant(_I64, GOLDEN)
    key = _mix(builder, builder.add(seed, golden))
    key = _mix(builder, builder.add(builder.xor(key, choice_index), golden))
    return _mix(builder, builder.add(builder.xor(key, output_index), golden))


@instruction(vector, types.intp, types.intp, types.intp)
def noise_words(builder: Any, key: Any, token: Any, target: Any) -> Any:
    """Store the upper 52 bits of the words of 16 tokens from `token` on; returns 1 - uniform, as float32."""
    lanes = ir.Constant(_WORDS, list(range(1, LANES + 1)))
    tokens = builder.add(splat(builder, token), lanes)
    offset = builder.mul(tokens, _constant(_WORDS, GOLDEN))
    bits = builder.lshr(_mix(builder, builder.add(splat(builder, key), offset)), _constant(_WORDS, 12))
    builder.store(bits, pointer_to(builder, target, _WORDS), align=8)
    left = builder.sub(_constant(_WORDS, 1 << 52), bits)
    gap = builder.fsub(builder.uitofp(left, _DOUBLES), _constant(_DOUBLES, 0.5))
    return builder.fptrunc(builder.fmul(gap, _constant(_DOUBLES, 2.0**-52)), VEC)


@inline
def uniform(bits):
    """In (0, 1), float64, from a stored word."""
    return (float(bits) + 0.5) * 2.0**-52
