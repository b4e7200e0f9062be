"""The launches of the Triton attention: tiles of one kind, of both kinds in one, and the parts' join."""

from __future__ import annotations

import triton
import triton.language as tl

from ellm.kernels.triton_attention import NEG_INF, attend, join
from ellm.kernels.triton_floats import narrow


# Not specialised: what changes from step to step would compile the kernel anew.
@triton.jit(do_not_specialize=["first_entry", "num_entries", "num_parts"])
def attend_kernel(
    q,
    k_cache,
    v_cache,
    out,
    part_peaks,
    part_totals,
    cu_seqlens,
    kv_lens,
    tables,
    positions,
    first_entry,
    num_entries,
    num_heads,
    num_parts,
    scale,
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
    SINGLE: tl.constexpr,
    TOKENS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid: (tiles, K), or (entries, K, parts) where PARTS."""
    attend(
        tl.program_id(0), tl.program_id(1), tl.program_id(2), q, k_cache, v_cache, out, part_peaks,
        part_totals, cu_seqlens, kv_lens, tables, positions, first_entry, num_entries, num_heads, num_parts,
        scale, window, q_row, q_head, k_block, k_head, k_token, v_block, v_head, v_token, table_row,
        GROUP, DIM, PADDED, BLOCK_SIZE, HAS_WINDOW, SINGLE, TOKENS, M, N, SPLIT, PARTS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_parts"])
def join_kernel(
    parts,  # [entries, H, parts, D] float32
    part_peaks,  # [entries, H, parts] float32
    part_totals,
    out,  # [R, H, D]; row i is entry i's
    kv_lens,
    positions,
    num_heads,
    num_parts,
    window,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Grid: (entries of one row, H)."""
    entry = tl.program_id(0)
    at = entry.to(tl.int64) * num_heads + tl.program_id(1)
    position = tl.load(positions + entry).to(tl.int32)
    end = tl.minimum(tl.load(kv_lens + entry), position + 1)
    low = end * 0
    if HAS_WINDOW:
        low = tl.maximum(position - window + 1, 0)
    dim = tl.arange(0, PADDED)
    acc = tl.zeros([1, PADDED], dtype=tl.float32)
    peak = tl.full([1], NEG_INF, dtype=tl.float32)
    total = tl.zeros([1], dtype=tl.float32)
    one = tl.arange(0, 1)
    for index in range(low // SPLIT, (end + SPLIT - 1) // SPLIT):
        part_at = at * num_parts + index + one
        part = tl.load(parts + part_at[:, None] * DIM + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)
        part_peak, part_total = tl.load(part_peaks + part_at), tl.load(part_totals + part_at)
        acc, peak, total = join(acc, peak, total, part, part_peak, part_total)
    total = tl.where(total > 0, total, 1.0)  # a row that sees nothing: padding
    result = narrow(acc / total[:, None], out.dtype.element_ty)
    tl.store(out + (at + one)[:, None] * DIM + dim[None, :], result, mask=(dim < DIM)[None, :])


@triton.jit(do_not_specialize=["num_decode", "num_entries", "num_parts", "num_tiles"])
def attend_both_kernel(
    q,
    k_cache,
    v_cache,
    out,
    decode_out,  # `out` itself, or the parts' [entries, H, parts, D] float32 where PARTS
    part_peaks,
    part_totals,
    cu_seqlens,
    kv_lens,
    tables,
    positions,
    num_decode,  # entries of one row, which come first
    num_entries,  # all others
    num_heads,
    num_kv,
    num_parts,
    num_tiles,  # of the others, for each key/value head
    scale,
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
    TOKENS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    DECODE_M: tl.constexpr,
    DECODE_N: tl.constexpr,
    DECODE_SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid: (programs of both kinds,). They are dealt in proportion: wherever a device begins a run of
    neighbours, and so on every processor, there are some that wait for memory beside some that compute
    (POD-Attention, Kamath et al. 2025)."""
    program = tl.program_id(0).to(tl.int64)
    num_first = num_decode * num_kv * num_parts
    before = program * num_first // tl.num_programs(0)
    if (program + 1) * num_first // tl.num_programs(0) > before:
        number = before.to(tl.int32)
        entry, head = number % num_decode, number // num_decode % num_kv
        attend(
            entry, head, number // (num_decode * num_kv), q, k_cache, v_cache, decode_out, part_peaks,
            part_totals, cu_seqlens, kv_lens, tables, positions, 0, num_decode, num_heads, num_parts, scale,
            window, q_row, q_head, k_block, k_head, k_token, v_block, v_head, v_token, table_row,
            GROUP, DIM, PADDED, BLOCK_SIZE, HAS_WINDOW, True, 1, DECODE_M, DECODE_N, DECODE_SPLIT, PARTS,
        )  # fmt: skip
    else:
        number = (program - before).to(tl.int32)
        attend(
            number % num_tiles, number // num_tiles, number * 0, q, k_cache, v_cache, out, part_peaks,
            part_totals, cu_seqlens, kv_lens, tables, positions, num_decode, num_entries, num_heads, 1, scale,
            window, q_row, q_head, k_block, k_head, k_token, v_block, v_head, v_token, table_row,
            GROUP, DIM, PADDED, BLOCK_SIZE, HAS_WINDOW, False, TOKENS, M, N, SPLIT, False,
        )  # fmt: skip
