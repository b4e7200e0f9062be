"""A linear layer on `jit_linear`: its weight in panels, laid out once."""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor
from torch.nn import functional as F

from ellm.kernels import jit_linear, jit_rows
from ellm.kernels.jit_ir import LANES, compiled_for
from ellm.kernels.jit_linear import GROUP, HAS_PAIRS, PAIRS, SUMS_BYTES
from ellm.kernels.jit_memory import KINDS
from ellm.kernels.numba_attention import UNIT_BYTES
from ellm.kernels.packed_linear import is_packable
from ellm.kernels.scratch import scratch

MOST_UNIT_ROWS, LEAST_UNIT_ROWS = 384, 24
UNITS_PER_THREAD = 4  # below, units are halved


@functools.cache
def suits_processor(dtype: torch.dtype) -> bool:
    """Whether the loop is at its best here: x86 with AVX2 and FMA. oneDNN has faster ones for bfloat16 where
    the processor multiplies matrices of it (AMX), or has AVX-512 or AVX-NE-CONVERT and no dot products of
    its pairs."""
    if platform.machine() not in ("x86_64", "AMD64") or not (compiled_for("avx2") and compiled_for("fma")):
        return False
    if dtype != torch.bfloat16:
        return True
    return not compiled_for("amx-bf16") if HAS_PAIRS else not is_packable(dtype)


def _widened(x: Tensor) -> Tensor:
    """x [R, n] in float32."""
    rows, n = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    size = x.element_size()
    out, step = torch.empty((rows, n), dtype=torch.float32, device="cpu"), max(1, UNIT_BYTES // (4 * n))
    words = (rows, step, n, x.data_ptr(), x.stride(0) * size, out.data_ptr())
    jit_rows.widen(KINDS[x.dtype], -(-rows // step), words)
    return out


class JitLinear:
    """y = x W^T + b; STRICT."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in] and bias [out], of one type, on the CPU."""
        assert weight.is_cpu
        self.out_features, self.in_features = weight.shape
        assert self.in_features > 0
        self._dtype = weight.dtype
        self._num_panels = -(-self.out_features // (GROUP * LANES)) * GROUP
        missing = self._num_panels * LANES - self.out_features
        padded = F.pad(weight.detach(), (0, 0, 0, missing)) if missing else weight.detach()
        self._kind, self._per_word = KINDS[weight.dtype], 1
        if HAS_PAIRS and weight.dtype == torch.bfloat16:
            self._kind, self._per_word = PAIRS, 2
            padded = F.pad(padded, (0, 1)) if self.in_features % 2 else padded
        self._words = -(-self.in_features // self._per_word)
        panels = padded.reshape(self._num_panels, LANES, self._words, self._per_word)
        self._weight = panels.transpose(1, 2).contiguous()
        self._bias = None if bias is None else F.pad(bias.detach().float(), (0, missing))

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, in_features] -> [R, out_features]."""
        rows, inputs = x.shape
        assert inputs == self.in_features
        assert x.dtype == self._dtype
        assert x.is_cpu
        out = torch.empty((rows, self.out_features), dtype=self._dtype, device="cpu")
        if rows == 0:
            return out
        if self._kind == PAIRS:
            x = F.pad(x, (0, 1)) if inputs % 2 else x
        elif self._dtype != torch.float32:
            x = _widened(x)
        by_row, by_input = x.stride()
        if by_input != 1:
            x = x.contiguous()
            by_row = x.shape[1]
        threads = torch.get_num_threads()
        width, block_rows = self._unit(rows, threads * UNITS_PER_THREAD)
        runs = self._num_panels // width
        units = runs * -(-rows // block_rows)
        words = (
            *(units, width, runs, block_rows, rows, self._words, self.out_features),
            *(x.data_ptr(), x.element_size() * by_row, self._weight.data_ptr()),
            0 if self._bias is None else self._bias.data_ptr(),
            *(out.data_ptr(), out.element_size() * self.out_features, scratch(threads * SUMS_BYTES)),
        )
        jit_linear.linear(self._kind, units, words)
        return out

    def _unit(self, rows: int, enough: int) -> tuple[int, int]:
        """Panels and rows of a unit, so that there are `enough` where that can be. No sum depends on it."""
        runs, block_rows = self._num_panels // GROUP, MOST_UNIT_ROWS
        while block_rows > LEAST_UNIT_ROWS and runs * -(-rows // block_rows) < enough:
            block_rows //= 2
        return (GROUP if runs * -(-rows // block_rows) >= enough else GROUP // 2), block_rows
