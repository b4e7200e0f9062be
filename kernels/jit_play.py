"""Runs a list of kernels one after the other, as `jit_launch` runs each.

The block: how many; the address of GOMP_parallel, or 0; threads; then for each kernel its function, the
address of its block, and its units of work.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from ellm.kernels.jit_ir import I32, instruction
from ellm.kernels.jit_launch import Kernel
from ellm.kernels.jit_memory import load_i64

HEADER, ENTRY = 3, 3  # words
_I64 = ir.IntType(64)


def _call(builder: Any, address: Any, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in arguments])
    builder.call(builder.inttoptr(address, kind.as_pointer()), arguments)


@instruction(types.void, types.intp, types.intp)
def _alone(builder: Any, function: Any, block: Any) -> None:
    _call(builder, function, block)


@instruction(types.void, *[types.intp] * 4)
def _parallel(builder: Any, parallel: Any, function: Any, block: Any, threads: Any) -> None:
    _call(builder, parallel, function, block, builder.trunc(threads, I32), ir.Constant(I32, 0))


@instruction(types.void, types.intp)
def _clear_counters(builder: Any, block: Any) -> None:
    for offset in (0, 8):
        address = builder.add(block, ir.Constant(_I64, offset))
        builder.store(ir.Constant(_I64, 0), builder.inttoptr(address, _I64.as_pointer()), align=8)


def _play(variant: int) -> Any:
    def play(block):
        count, parallel, threads = load_i64(block), load_i64(block + 8), load_i64(block + 16)
        for i in range(count):
            entry = block + 8 * (HEADER + ENTRY * i)
            function, words, units = load_i64(entry), load_i64(entry + 8), load_i64(entry + 16)
            _clear_counters(words)
            if units > 1 and parallel != 0:
                _parallel(parallel, function, words, threads)
            else:
                _alone(function, words)

    return play


play = Kernel(_play)
