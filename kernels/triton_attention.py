"""Paged causal attention in Triton: prefill, chunks, decode and recompute rows by the same arithmetic.

A program takes one query tile: rows of one entry times the query heads of one key/value head. It walks the
keys in tiles from fixed absolute positions, in order (online softmax, base 2). In `SPLIT` mode it starts
afresh at every multiple of SPLIT tokens and joins the parts in order; decode then has a program for each
part, and a second kernel that joins them by the same arithmetic. So where the keys are split depends on
positions alone, never on the batch; and with the same tile, prefill and decode do the same sums in the same
order.

What a row does not see is never read, or read as 0: neither what lies behind an entry's end, nor what lies
before the window, nor blocks of others can reach a result, NaN included.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ellm.kernels.triton_floats import INTERPRETED, narrow

NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def _find_entry(cu_seqlens, first_entry, num_entries, tile, TOKENS: tl.constexpr):
    """(entry, its first row, the tile's first row). The tiles of the i-th entry are numbered from
    (rows before it) // TOKENS + i on, which is room for all of them."""
    base = tl.load(cu_seqlens + first_entry)
    low = base * 0
    high = low + num_entries
    while low < high:
        middle = (low + high) // 2
        first = (tl.load(cu_seqlens + first_entry + middle) - base) // TOKENS + middle
        low = tl.where(first <= tile, middle + 1, low)
        high = tl.where(first <= tile, high, middle)
    entry = first_entry + low - 1
    row = tl.load(cu_seqlens + entry)
    first = (row - base) // TOKENS + low - 1
    return entry, row, row + (tile - first) * TOKENS


@triton.jit
def finite(peak):
    """Where nothing has been seen yet, any finite number: exp2(-inf - 0) is 0."""
    return tl.where(peak == NEG_INF, 0.0, peak)


@triton.jit
def join(acc, peak, total, part, part_peak, part_total):
    """Two states of the online softmax as one; one that has seen nothing changes no bit of the other."""
    new_peak = tl.maximum(peak, part_peak)
    base = finite(new_peak)
    decay = tl.exp2(peak - base)
    part_decay = tl.exp2(part_peak - base)
    acc = tl.fma(acc, tl.expand_dims(decay, -1), part * tl.expand_dims(part_decay, -1))
    total = tl.fma(total, decay, part_total * part_decay)
    return acc, new_peak, total


@triton.jit
def _walk(
    q,
    position,
    keys,
    values,
    table,
    first,
    end,
    low,
    scale,
    window,
    k_block,
    k_token,
    v_block,
    v_token,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    N: tl.constexpr,
):
    """The keys from `first`, a multiple of N, to `end`: acc [M, D], peak [M], total [M] of q [M, D]."""
    M: tl.constexpr = q.shape[0]
    PADDED: tl.constexpr = q.shape[1]
    acc = tl.zeros([M, PADDED], dtype=tl.float32)
    peak = tl.full([M], NEG_INF, dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    dim = tl.arange(0, PADDED)
    for start in range(first, end, N):
        token = start + tl.arange(0, N)
        there = (token < end) & (token >= low)
        block = tl.load(table + token // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        offset = token % BLOCK_SIZE
        key_at = block * k_block + offset * k_token
        key = tl.load(
            keys + key_at[None, :] + dim[:, None], mask=there[None, :] & (dim < DIM)[:, None], other=0.0
        )
        scores = tl.dot(q, key.to(q.dtype), input_precision="ieee") * scale
        seen = there[None, :] & (token[None, :] <= position[:, None])
        if HAS_WINDOW:
            seen = seen & (token[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, NEG_INF)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = finite(new_peak)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(peak - base)
        total = tl.fma(total, decay, tl.sum(weights, 1))
        peak = new_peak
        value_at = block * v_block + offset * v_token
        value = tl.load(
            values + value_at[:, None] + dim[None, :], mask=there[:, None] & (dim < DIM)[None, :], other=0.0
        ).to(q.dtype)
        acc = tl.dot(weights.to(q.dtype), value, acc * decay[:, None], input_precision="ieee")
    return acc, peak, total


@triton.jit
def _walk_parts(
    q,
    position,
    keys,
    values,
    table,
    end,
    low,
    scale,
    window,
    k_block,
    k_token,
    v_block,
    v_token,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """All keys that the tile sees, with a fresh start at every multiple of SPLIT tokens."""
    M: tl.constexpr = q.shape[0]
    PADDED: tl.constexpr = q.shape[1]
    acc = tl.zeros([M, PADDED], dtype=tl.float32)
    peak = tl.full([M], NEG_INF, dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    for start in range(low // SPLIT * SPLIT, end, SPLIT):
        first = tl.maximum(start, low // N * N)
        part, part_peak, part_total = _walk(
            q, position, keys, values, table, first, tl.minimum(end, start + SPLIT), low, scale, window,
            k_block, k_token, v_block, v_token, DIM, BLOCK_SIZE, HAS_WINDOW, N,
        )  # fmt: skip
        acc, peak, total = join(acc, peak, total, part, part_peak, part_total)
    return acc, peak, total


@triton.jit
def _place(tile, cu_seqlens, positions, first_entry, num_entries, SINGLE: tl.constexpr, TOKENS: tl.constexpr):
    """(entry, the tile's first row, its number of rows, the first row's position)."""
    if SINGLE:
        return tile, tile, tile * 0 + 1, tl.load(positions + tile).to(tl.int32)
    else:
        entry, entry_row, row = _find_entry(cu_seqlens, first_entry, num_entries, tile, TOKENS)
        rows = tl.minimum(tl.load(cu_seqlens + entry + 1) - row, TOKENS)
        return entry, row, rows, tl.load(positions + entry_row).to(tl.int32) + row - entry_row


@triton.jit
def attend(
    tile,
    kv_head,
    part,
    q,
    k_cache,
    v_cache,
    out,  # [R, H, D], or [entries, H, parts, D] float32 where PARTS
    part_peaks,  # [entries, H, parts] float32 where PARTS
    part_totals,
    cu_seqlens,
    kv_lens,
    tables,
    positions,
    first_entry,  # of the tiles
    num_entries,
    num_heads,
    num_parts,
    scale,  # times log2(e)
    window,
    q_row,
    q_head,
    k_block,
    k_head,
    k_token,
    v_block,
    v_head,
    v_token,
    table_row,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SINGLE: tl.constexpr,  # entry i has row i alone
    TOKENS: tl.constexpr,  # rows of an entry in a tile
    M: tl.constexpr,
    N: tl.constexpr,
    SPLIT: tl.constexpr,  # tokens, a multiple of N; 0: no fresh starts
    PARTS: tl.constexpr,
):
    """One tile of one key/value head, and of one part where PARTS, which implies SINGLE."""
    entry, row, rows, first_position = _place(
        tile, cu_seqlens, positions, first_entry, num_entries, SINGLE, TOKENS
    )
    end = tl.minimum(tl.load(kv_lens + entry), first_position + rows)
    low = end * 0
    if HAS_WINDOW:
        low = tl.maximum(first_position - window + 1, 0)
    sees = rows > 0
    if PARTS:
        sees = (part * SPLIT < end) & ((part + 1) * SPLIT > low)
    if sees:
        token = tl.arange(0, M) // GROUP
        head = kv_head * GROUP + tl.arange(0, M) % GROUP
        dim = tl.arange(0, PADDED)
        mine = (token < rows)[:, None] & (dim < DIM)[None, :]
        query_at = (row + token).to(tl.int64) * q_row + head * q_head
        query = tl.load(q + query_at[:, None] + dim[None, :], mask=mine, other=0.0)
        if INTERPRETED:
            query = query.to(tl.float32)
        keys = k_cache + kv_head.to(tl.int64) * k_head
        values = v_cache + kv_head.to(tl.int64) * v_head
        table = tables + entry.to(tl.int64) * table_row
        if SPLIT > 0 and not PARTS:
            acc, peak, total = _walk_parts(
                query, first_position + token, keys, values, table, end, low, scale, window,
                k_block, k_token, v_block, v_token, DIM, BLOCK_SIZE, HAS_WINDOW, N, SPLIT,
            )  # fmt: skip
        else:
            first = low // N * N
            if PARTS:
                first = tl.maximum(part * SPLIT, first)
                end = tl.minimum(end, (part + 1) * SPLIT)
            acc, peak, total = _walk(
                query, first_position + token, keys, values, table, first, end, low, scale, window,
                k_block, k_token, v_block, v_token, DIM, BLOCK_SIZE, HAS_WINDOW, N,
            )  # fmt: skip
        if PARTS:
            part_at = (entry.to(tl.int64) * num_heads + head) * num_parts + part
            tl.store(out + part_at[:, None] * DIM + dim[None, :], acc, mask=mine)
            tl.store(part_peaks + part_at, peak, mask=token < rows)
            tl.store(part_totals + part_at, total, mask=token < rows)
        else:
            total = tl.where(total > 0, total, 1.0)  # rows that are not there
            out_at = ((row + token).to(tl.int64) * num_heads + head) * DIM
            result = narrow(acc / total[:, None], out.dtype.element_ty)
            tl.store(out + out_at[:, None] + dim[None, :], result, mask=mine)
