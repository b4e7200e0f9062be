"""What every Triton kernel needs to know of floats: how to round, and whether an interpreter runs it.

The interpreter (TRITON_INTERPRET=1, no GPU) computes bfloat16 on raw bits and truncates where it should
round, so kernels compute in float32 and give results away by `narrow` alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Of every launch: products and sums are rounded as written, so two kernels that do the same sums agree.
OPTIONS = {"enable_fp_fusion": False}

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x rounded to the nearest value of `dtype`, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        rounded = tl.where(x == x, rounded, bits | 0x00400000)  # NaN stays one
        return rounded.to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)
