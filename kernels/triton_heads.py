"""q/k norm, rotary embedding and KV store of one layer in one Triton launch.

A program takes heads of one row: of q, which is rotated in place, or of k and v, which go to their slots
without passing through memory in between. Each step is rounded to the tensors' type, as if it had been
written: the result is that of the separate kernels. A slot below 0 is no slot: nothing is stored.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ellm.kernels.ops import AttentionMeta, HeadTransform
from ellm.kernels.triton_floats import OPTIONS, narrow

ELEMENTS = 2048  # of a program


@triton.jit
def _transform(
    x,  # the row's heads
    target,  # where they go
    weight,
    cos,
    sin,
    first_head,
    num_heads,
    head_stride,
    target_stride,
    eps,
    slot,  # below 0: nothing is stored
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PADDED_REST: tl.constexpr,
    HEADS: tl.constexpr,
    NORMS: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    head = first_head + tl.arange(0, HEADS)
    there = (head < num_heads)[:, None]
    pair = tl.arange(0, PADDED_HALF)
    mine = there & (pair < HALF)[None, :]
    source = x + head[:, None] * head_stride
    first = tl.load(source + pair[None, :], mask=mine, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + pair[None, :], mask=mine, other=0.0).to(tl.float32)
    rest = 2 * HALF + tl.arange(0, PADDED_REST)
    passes = there & (rest < DIM)[None, :]
    if 2 * HALF < DIM:
        third = tl.load(source + rest[None, :], mask=passes, other=0.0).to(tl.float32)
    if NORMS:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if 2 * HALF < DIM:
            squares += tl.sum(third * third, 1)
        scale = tl.rsqrt(squares / DIM + eps)[:, None]
        factor = tl.load(weight + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        first = narrow(first * scale * factor, x.dtype.element_ty).to(tl.float32)
        factor = tl.load(weight + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        second = narrow(second * scale * factor, x.dtype.element_ty).to(tl.float32)
        if 2 * HALF < DIM:
            factor = tl.load(weight + rest, mask=rest < DIM, other=0.0).to(tl.float32)[None, :]
            third = narrow(third * scale * factor, x.dtype.element_ty).to(tl.float32)
    place = target + head[:, None] * target_stride
    mine = mine & (slot + pair[None, :] * 0 >= 0)
    tl.store(place + pair[None, :], narrow(first * cos - second * sin, x.dtype.element_ty), mask=mine)
    tl.store(place + HALF + pair[None, :], narrow(second * cos + first * sin, x.dtype.element_ty), mask=mine)
    if 2 * HALF < DIM and (NORMS or not IN_PLACE):
        tl.store(
            place + rest[None, :],
            narrow(third, x.dtype.element_ty),
            mask=passes & (slot + rest[None, :] * 0 >= 0),
        )


@triton.jit
def rotary_store_kernel(
    q,
    k,
    v,
    q_norm,
    k_norm,
    positions,
    slots,
    cos_sin,
    k_cache,
    v_cache,
    num_q,
    num_k,
    eps,
    q_row,
    q_head,
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
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PADDED_REST: tl.constexpr,
    HEADS: tl.constexpr,
    NORMS: tl.constexpr,
):
    """Grid: (rows, tiles of q's heads, then of k's and v's)."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PADDED_HALF)
    at = cos_sin + tl.load(positions + row) * (2 * HALF) + pair
    cos = tl.load(at, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(at + HALF, mask=pair < HALF, other=0.0)[None, :]
    tile = tl.program_id(1)
    q_tiles = (num_q + HEADS - 1) // HEADS
    if tile < q_tiles:
        _transform(
            q + row * q_row, q + row * q_row, q_norm, cos, sin, tile * HEADS, num_q, q_head, q_head, eps,
            row * 0, DIM, HALF, PADDED_HALF, PADDED_REST, HEADS, NORMS, True,
        )  # fmt: skip
    else:
        first = (tile - q_tiles) * HEADS
        slot = tl.load(slots + row)
        place = tl.maximum(slot, 0)
        block, offset = place // BLOCK_SIZE, place % BLOCK_SIZE
        target = k_cache + block * k_block + offset * k_token
        _transform(
            k + row * k_row, target, k_norm, cos, sin, first, num_k, k_head, k_cache_head, eps, slot,
            DIM, HALF, PADDED_HALF, PADDED_REST, HEADS, NORMS, False,
        )  # fmt: skip
        head = first + tl.arange(0, HEADS)[:, None]
        dim = tl.arange(0, PADDED)[None, :]
        mine = (head < num_k) & (dim < DIM) & (slot + dim * 0 >= 0)
        value = tl.load(v + row * v_row + head * v_head + dim, mask=mine)
        target = v_cache + block * v_block + offset * v_token
        tl.store(target + head * v_cache_head + dim, value, mask=mine)


def handles(heads: HeadTransform) -> bool:
    """Whether the kernel has what a layer does to its heads: a rotation, and norms of both or of none."""
    return heads.cos_sin is not None and (heads.q_norm is None) == (heads.k_norm is None)


def rotary_store(
    q: Tensor, k: Tensor, v: Tensor, meta: AttentionMeta, kv: tuple[Tensor, Tensor], heads: HeadTransform
) -> Tensor:
    """Norm and rotate q [R, H, D] in place and k [R, K, D] on its way to its slots; store v. Returns q."""
    k_cache, v_cache = kv
    assert handles(heads)
    assert heads.cos_sin is not None
    assert heads.cos_sin.is_contiguous()
    assert q.stride(2) == k.stride(2) == v.stride(2) == k_cache.stride(3) == v_cache.stride(3) == 1
    (rows, num_q, dim), num_k = q.shape, k.shape[1]
    if rows == 0:
        return q
    half = heads.cos_sin.shape[2]
    assert 2 * half <= dim
    padded = triton.next_power_of_2(dim)
    count = min(max(1, ELEMENTS // padded), triton.next_power_of_2(max(num_q, num_k)))
    norms = (heads.q_norm, heads.k_norm)
    sizes: dict[str, Any] = {
        "BLOCK_SIZE": k_cache.shape[2],
        "DIM": dim,
        "PADDED": padded,
        "HALF": half,
        "PADDED_HALF": triton.next_power_of_2(half),
        "PADDED_REST": triton.next_power_of_2(max(1, dim - 2 * half)),
        "HEADS": count,
        "NORMS": norms[0] is not None,
    }
    rotary_store_kernel[(rows, triton.cdiv(num_q, count) + triton.cdiv(num_k, count))](
        q,
        k,
        v,
        *(q if norm is None else norm for norm in norms),
        meta.positions,
        meta.slot_mapping,
        heads.cos_sin,
        k_cache,
        v_cache,
        num_q,
        num_k,
        heads.eps,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        **sizes,
        **OPTIONS,
    )
    return q
