"""Norms, gated activation, rotary embedding and KV store in Triton: a row's result depends on that row alone.

Each program takes whole rows, so sums run in the same order wherever a row stands in the batch. Rows may be
views into wider ones; elements of a row lie side by side.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ellm.kernels.triton_floats import OPTIONS, narrow

ELEMENTS = 2048  # of a program, where rows are short
COLUMNS = 1024  # of a program, where columns are independent


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    num_rows,
    x_row,
    residual_row,
    eps,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    ADDS: tl.constexpr,
):
    """The sum is rounded to its type before it is normed, as it is in memory."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, PADDED)
    mine = (row < num_rows)[:, None] & (column < SIZE)[None, :]
    wide = tl.load(x + row[:, None] * x_row + column[None, :], mask=mine, other=0.0).to(tl.float32)
    if ADDS:
        at = residual + row[:, None] * residual_row + column[None, :]
        total = narrow(wide + tl.load(at, mask=mine, other=0.0).to(tl.float32), x.dtype.element_ty)
        tl.store(at, total, mask=mine)
        wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / SIZE + eps)
    factor = tl.load(weight + column, mask=column < SIZE, other=0.0).to(tl.float32)
    result = narrow(wide * scale[:, None] * factor[None, :], out.dtype.element_ty)
    tl.store(out + row[:, None] * SIZE + column[None, :], result, mask=mine)


@triton.jit
def layer_norm_kernel(
    x,
    weight,
    bias,
    out,
    num_rows,
    x_row,
    eps,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, PADDED)
    inside = column < SIZE
    mine = (row < num_rows)[:, None] & inside[None, :]
    wide = tl.load(x + row[:, None] * x_row + column[None, :], mask=mine, other=0.0).to(tl.float32)
    mean = tl.sum(wide, 1) / SIZE
    centred = tl.where(inside[None, :], wide - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / SIZE + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    result = narrow(centred * scale[:, None] * factor[None, :] + shift[None, :], out.dtype.element_ty)
    tl.store(out + row[:, None] * SIZE + column[None, :], result, mask=mine)


@triton.jit
def silu_mul_kernel(gate_up, out, row_stride, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Grid: (rows, columns of a program)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mine = column < SIZE
    at = gate_up + row * row_stride + column
    gate = tl.load(at, mask=mine, other=0.0).to(tl.float32)
    up = tl.load(at + SIZE, mask=mine, other=0.0).to(tl.float32)
    # exp of the negative magnitude alone: no overflow at any gate.
    small = tl.exp(-tl.abs(gate))
    sigmoid = tl.where(gate < 0, small, 1.0) / (1.0 + small)
    tl.store(out + row * SIZE + column, narrow(gate * sigmoid * up, out.dtype.element_ty), mask=mine)


@triton.jit
def _rotate_heads(
    x,
    cos,
    sin,
    first_head,
    num_heads,
    head_stride,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
):
    head = first_head + tl.arange(0, HEADS)
    pair = tl.arange(0, PADDED)
    mine = (head < num_heads)[:, None] & (pair < HALF)[None, :]
    at = x + head[:, None] * head_stride + pair[None, :]
    first = tl.load(at, mask=mine, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=mine, other=0.0).to(tl.float32)
    tl.store(at, narrow(first * cos - second * sin, x.dtype.element_ty), mask=mine)
    tl.store(at + HALF, narrow(second * cos + first * sin, x.dtype.element_ty), mask=mine)


@triton.jit
def rotary_kernel(
    q,
    k,
    positions,
    cos_sin,
    num_q,
    num_k,
    q_row,
    q_head,
    k_row,
    k_head,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid: (rows, tiles of q's heads, then of k's)."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PADDED)
    at = cos_sin + tl.load(positions + row) * (2 * HALF) + pair
    cos = tl.load(at, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(at + HALF, mask=pair < HALF, other=0.0)[None, :]
    tile = tl.program_id(1)
    q_tiles = (num_q + HEADS - 1) // HEADS
    if tile < q_tiles:
        _rotate_heads(q + row * q_row, cos, sin, tile * HEADS, num_q, q_head, HALF, PADDED, HEADS)
    else:
        _rotate_heads(k + row * k_row, cos, sin, (tile - q_tiles) * HEADS, num_k, k_head, HALF, PADDED, HEADS)


@triton.jit
def kv_store_kernel(
    k,
    v,
    slots,
    k_cache,
    v_cache,
    num_heads,
    k_row,
    k_head,
    v_row,
    v_head,
    k_block,
    k_cache_head,
    k_token,
    v_block,
    v_cache_head,
    v_token,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid: (rows, tiles of heads). Bits are copied as they are; a slot below 0 is no slot."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, PADDED)[None, :]
    slot = tl.load(slots + row)
    mine = (head < num_heads) & (dim < DIM) & (slot + dim * 0 >= 0)
    slot = tl.maximum(slot, 0)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    key = tl.load(k + row * k_row + head * k_head + dim, mask=mine)
    tl.store(k_cache + block * k_block + head * k_cache_head + offset * k_token + dim, key, mask=mine)
    value = tl.load(v + row * v_row + head * v_head + dim, mask=mine)
    tl.store(v_cache + block * v_block + head * v_cache_head + offset * v_token + dim, value, mask=mine)


def _row_tiles(rows: int, size: int) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and sizes of a kernel that takes whole rows of `size` elements."""
    padded = triton.next_power_of_2(size)
    count = max(1, ELEMENTS // padded)
    warps = min(16, max(4, padded // 1024))
    return (-(-rows // count),), {
        "SIZE": size,
        "PADDED": padded,
        "ROWS": count,
        "num_warps": warps,
        **OPTIONS,
    }


def _rows_of(x: Tensor) -> int:
    """From row to row of x [R, n]."""
    assert x.stride(-1) == 1 or x.shape[-1] == 1
    return x.stride(0)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(normed, sum) of x [R, n]; the sum is written to `residual`."""
    rows, size = x.shape
    out = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    total = x if residual is None else residual
    assert total.dtype == x.dtype
    if x.numel():
        grid, sizes = _row_tiles(rows, size)
        strides = (_rows_of(x), _rows_of(total))
        rms_norm_kernel[grid](x, total, weight, out, rows, *strides, eps, ADDS=residual is not None, **sizes)
    return out, total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [R, n] -> [R, n], statistics in float32."""
    rows, size = x.shape
    out = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    if x.numel():
        grid, sizes = _row_tiles(rows, size)
        layer_norm_kernel[grid](x, weight, bias, out, rows, _rows_of(x), eps, **sizes)
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """[R, 2 F] -> [R, F]."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        columns = min(COLUMNS, triton.next_power_of_2(size))
        grid = (rows, triton.cdiv(size, columns))
        silu_mul_kernel[grid](gate_up, out, _rows_of(gate_up), SIZE=size, COLUMNS=columns, **OPTIONS)
    return out


def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """Rotate q [R, H, D] and k [R, K, D] in place; both may be views into a wider row."""
    assert q.stride(2) == k.stride(2) == 1
    assert cos_sin.is_contiguous()
    rows, half = q.shape[0], cos_sin.shape[2]
    if rows == 0:
        return
    padded = triton.next_power_of_2(half)
    heads = max(1, ELEMENTS // 2 // padded)
    heads = min(heads, triton.next_power_of_2(max(q.shape[1], k.shape[1])))
    grid = (rows, triton.cdiv(q.shape[1], heads) + triton.cdiv(k.shape[1], heads))
    strides = (*q.stride()[:2], *k.stride()[:2])
    sizes = {"HALF": half, "PADDED": padded, "HEADS": heads}
    rotary_kernel[grid](q, k, positions, cos_sin, q.shape[1], k.shape[1], *strides, **sizes, **OPTIONS)


def kv_store(k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Write k, v [R, K, D] to slots of k_cache, v_cache [N, K, B, D]; slots are distinct."""
    assert k.stride(2) == v.stride(2) == k_cache.stride(3) == v_cache.stride(3) == 1
    rows, num_heads, dim = k.shape
    if rows == 0:
        return
    padded = triton.next_power_of_2(dim)
    heads = min(triton.next_power_of_2(num_heads), max(1, ELEMENTS // padded))
    strides = (*k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3])
    kv_store_kernel[(rows, triton.cdiv(num_heads, heads))](
        k,
        v,
        slot_mapping,
        k_cache,
        v_cache,
        num_heads,
        *strides,
        BLOCK_SIZE=k_cache.shape[2],
        DIM=dim,
        PADDED=padded,
        HEADS=heads,
        **OPTIONS,
    )
