"""Attention and the KV store on the CPU: checks tensors, lays out a step's work, runs the kernels.

A wrong block id would be a wild address, so ids are checked against the pool, once per step: every layer
brings the same tensors.
"""

from __future__ import annotations

import functools
import struct
import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ellm.kernels import jit_attention, jit_pool, jit_rows
from ellm.kernels.jit_math import LOG2_E
from ellm.kernels.jit_memory import KINDS
from ellm.kernels.ops import AttentionMeta
from ellm.kernels.recording import current
from ellm.kernels.scratch import scratch

UNIT_BYTES = 1 << 17  # rows of a unit of work: worth waking another thread for
UNBOUNDED = 1 << 40  # a window that is none


class _Seen(threading.local):
    """What this thread checked last."""

    steps: tuple[_Step, ...] = ()
    indices: dict[str, tuple[Tensor, int]]

    def __init__(self) -> None:
        self.indices = {}


@dataclass(frozen=True, slots=True)
class _Step:
    """The work of one step for one number of rows per run."""

    meta: AttentionMeta
    rows_per_run: int
    num_blocks: int
    runs: np.ndarray  # [runs, 3] int32: entry, first row, rows; kept alive for its address
    address: int
    longest: int  # rows of the longest run


_seen = _Seen()


@functools.lru_cache(maxsize=64)
def float_bits(value: float) -> int:
    """The bits of a float32."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits


def check_indices(name: str, indices: Tensor, limit: int) -> int:
    """The address of `indices` (int64, contiguous), all in [0, limit). A name's last tensor is known."""
    known = _seen.indices.get(name)
    recording = current()
    if recording is not None:
        recording.before((name, id(indices), limit), functools.partial(_check_range, name, indices, limit))
    elif known is None or known[0] is not indices or known[1] != limit:
        _check_range(name, indices, limit)
        _seen.indices[name] = (indices, limit)
    return indices.data_ptr()


def _check_range(name: str, indices: Tensor, limit: int) -> None:
    assert indices.dtype == torch.int64
    assert indices.is_contiguous()
    if indices.numel():
        low, high = indices.aminmax()
        assert low.item() >= 0, f"{name}: {low.item()} is below 0"
        assert high.item() < limit, f"{name}: {high.item()} is not below {limit}"


def kv_store(k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Write k, v [R, K, D] to slots of k_cache, v_cache [N, K, B, D]; slots are distinct."""
    rows, heads, dim = k.shape
    num_blocks, _, block_size, _ = k_cache.shape
    assert v.shape == k.shape
    assert v_cache.shape == k_cache.shape == (num_blocks, heads, block_size, dim)
    assert k.dtype == v.dtype == k_cache.dtype == v_cache.dtype
    size = k.element_size()
    words: tuple[int, ...] = (block_size, heads, dim * size)
    for x, cache in ((k, k_cache), (v, v_cache)):
        by_row, by_head, by_dim = x.stride()
        block, head, token, cache_dim = cache.stride()
        assert by_dim == cache_dim == 1
        strides = (cache.data_ptr(), block * size, head * size, token * size)
        words = (*words, x.data_ptr(), by_row * size, by_head * size, *strides)
    slots = check_indices("slot_mapping", slot_mapping, num_blocks * block_size)
    step = max(1, UNIT_BYTES // (2 * heads * dim * size))
    jit_rows.kv_store(0, -(-rows // step), (rows, step, slots, *words))


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float, window: int | None
) -> Tensor:
    """q [R, H, D] over the pool -> [R, H, D]; see `jit_attention`."""
    rows, heads, dim = q.shape
    num_blocks, kv_heads, block_size, _ = k_cache.shape
    group = heads // kv_heads
    assert heads == group * kv_heads
    assert v_cache.shape == k_cache.shape == (num_blocks, kv_heads, block_size, dim)
    assert q.dtype == k_cache.dtype == v_cache.dtype
    kind, size = KINDS[q.dtype], q.element_size()
    out = torch.empty((rows, heads, dim), dtype=q.dtype)
    step = _lay_out(meta, max(1, jit_pool.MAX_VECTORS // group), num_blocks)
    units = len(step.runs) * kv_heads
    if not units:
        return out
    by_row, by_head, by_dim = q.stride()
    assert by_dim == 1
    in_place = True
    words: tuple[int, ...] = (units, step.address, kv_heads, group, dim, block_size)
    words = (*words, window or UNBOUNDED, float_bits(scale * LOG2_E))
    words = (*words, q.data_ptr(), by_row * size, by_head * size, out.data_ptr())
    for cache in (k_cache, v_cache):
        block, head, token, cache_dim = cache.stride()
        assert cache_dim == 1
        in_place = in_place and jit_pool.reads_in_place(kind, dim, block_size, token * size)
        words = (*words, cache.data_ptr(), block * size, head * size, token * size)
    tables = meta.block_tables
    assert tables.shape[1] * block_size >= meta.max_kv_len
    num_bytes = jit_pool.scratch_bytes(step.longest * group, dim)
    memory = scratch(num_bytes * torch.get_num_threads())
    words = (
        *words,
        tables.data_ptr(),
        tables.shape[1],
        meta.positions.data_ptr(),
        memory,
        num_bytes,
        in_place,
    )
    jit_attention.paged_attention(kind, units, words)
    return out


def _lay_out(meta: AttentionMeta, rows_per_run: int, num_blocks: int) -> _Step:
    """The step's runs of rows, longest work first; made once and kept for the other layers."""
    recording = current()
    if recording is not None:
        recording.before(("tables", id(meta), num_blocks), functools.partial(_check_tables, meta, num_blocks))
    for step in _seen.steps:
        if step.meta is meta and step.rows_per_run == rows_per_run and step.num_blocks == num_blocks:
            if recording is not None:
                recording.keep(step)
            return step
    for x, dtype in (
        (meta.cu_seqlens_q, torch.int32),
        (meta.block_tables, torch.int32),
        (meta.positions, torch.int64),
    ):
        assert x.dtype == dtype
        assert x.is_contiguous()
        assert x.is_cpu
    if recording is None:
        _check_tables(meta, num_blocks)
    cu = meta.cu_seqlens_q.numpy()
    lengths = np.diff(cu)
    counts = -(-lengths // rows_per_run)
    entry = np.repeat(np.arange(len(lengths)), counts)
    first = (np.arange(len(entry)) - np.repeat(np.cumsum(counts) - counts, counts)) * rows_per_run
    rows = np.minimum(lengths[entry] - first, rows_per_run)
    # Chunks come after decode rows, and their last rows see most: from the end on, units grow smaller.
    runs = np.stack([entry, cu[entry] + first, rows], axis=1)[::-1].astype(np.int32, order="C")
    step = _Step(meta, rows_per_run, num_blocks, runs, runs.ctypes.data, int(rows.max(initial=0)))
    same_meta = tuple(s for s in _seen.steps if s.meta is meta)
    _seen.steps = (*same_meta, step)
    if recording is not None:
        recording.keep(step)
    return step


def _check_tables(meta: AttentionMeta, num_blocks: int) -> None:
    if meta.block_tables.numel():
        low, high = meta.block_tables.aminmax()
        assert low.item() >= 0
        assert high.item() < num_blocks
