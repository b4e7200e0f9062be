"""Batch-invariant linear layers in Triton: a row has the same bits in a batch of any size.

One tile and one order of sums for a type, whatever the number of rows: every element of the result is the
sum over its inputs in steps of `inner`, in order, by one program. Nothing is split over programs, so small
batches leave a GPU's processors idle where a library would split the sum: that is the price of STRICT.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ellm.kernels.triton_floats import INTERPRETED, OPTIONS, narrow

COLUMN_TILES = 8  # of outputs whose programs share the rows that they read


@dataclass(frozen=True, slots=True)
class LinearTile:
    """One program's share, and how it is compiled."""

    rows: int
    columns: int
    inner: int
    num_warps: int = 4
    num_stages: int = 3

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.columns}x{self.inner}w{self.num_warps}s{self.num_stages}"


WIDE = LinearTile(32, 64, 32, 4, 2)  # float32: no tensor cores at full precision
HALF = LinearTile(64, 64, 64)


def linear_tile(dtype: torch.dtype) -> LinearTile:
    """The tile of a type. Never of a batch: rows would have other bits in another."""
    return WIDE if dtype == torch.float32 else HALF


# Not specialised: a batch of one row would be compiled anew, and might be compiled otherwise.
@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    x,
    weight,
    bias,
    out,
    num_rows,
    num_out,
    num_in,
    x_row,
    weight_row,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
):
    """Grid: (tiles,): bands of COLUMN_TILES tiles of outputs, in each band row tile by row tile."""
    row_tiles = (num_rows + ROWS - 1) // ROWS
    column_tiles = (num_out + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0)
    band = tile // (COLUMN_TILES * row_tiles)
    width = tl.minimum(column_tiles - band * COLUMN_TILES, COLUMN_TILES)
    within = tile - band * COLUMN_TILES * row_tiles
    row = (within // width * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = ((band * COLUMN_TILES + within % width) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inner = tl.arange(0, INNER)
    there, wanted = (row < num_rows)[:, None], (column < num_out)[None, :]
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, num_in, INNER):
        at = start + inner
        inside = at < num_in
        a = tl.load(x + row[:, None] * x_row + at[None, :], mask=there & inside[None, :], other=0.0)
        b = tl.load(
            weight + column[None, :] * weight_row + at[:, None], mask=wanted & inside[:, None], other=0.0
        )
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=column < num_out, other=0.0).to(tl.float32)[None, :]
    result = narrow(acc, out.dtype.element_ty)
    tl.store(out + row[:, None] * num_out + column[None, :], result, mask=there & wanted)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [R, in], weight [out, in], bias [out] -> x W^T + b [R, out] in x's type; sums in float32."""
    rows, num_in = x.shape
    num_out = weight.shape[0]
    assert x.stride(1) == weight.stride(1) == 1
    assert x.dtype == weight.dtype
    out = torch.empty((rows, num_out), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = linear_tile(x.dtype)
    linear_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(num_out, tile.columns),)](
        x,
        weight,
        out if bias is None else bias,
        out,
        rows,
        num_out,
        num_in,
        x.stride(0),
        weight.stride(0),
        HAS_BIAS=bias is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        INNER=tile.inner,
        COLUMN_TILES=COLUMN_TILES,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **OPTIONS,
    )
    return out
