"""The CPU body: jitted loops over rows, STRICT. Every tensor is checked here; the kernels see addresses."""

from __future__ import annotations

import functools
import struct
import threading

import numpy as np
import torch
from torch import Tensor

from ellm.kernels import jit_attention, jit_pool, jit_rows
from ellm.kernels.jit_math import LOG2_E
from ellm.kernels.jit_memory import KINDS
from ellm.kernels.numba_sampling import logprobs, sample
from ellm.kernels.ops import AttentionMeta, Linear, SamplingBatch
from ellm.kernels.packed_linear import pack_linear
from ellm.kernels.scratch import scratch

UNIT_BYTES = 1 << 17  # rows of a unit of work: worth waking another thread for
UNBOUNDED = 1 << 40  # a window that is none


@functools.lru_cache(maxsize=64)
def _float_bits(value: float) -> int:
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits


def _rows(x: Tensor) -> tuple[int, int, int]:
    """x [R, n] with elements of a row side by side -> (kind, element bytes, row bytes)."""
    assert x.dim() == 2
    assert x.device.type == "cpu"
    assert x.stride(1) == 1 or x.shape[1] == 1
    size = x.element_size()
    return KINDS[x.dtype], size, x.stride(0) * size


class NumbaOps:
    """The `Ops` table in numba, on torch's threads."""

    name = "numba"
    deterministic = True

    def __init__(self) -> None:
        self._local = threading.local()

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Pack weight [out, in] and bias [out] for oneDNN; see `packed_linear`."""
        return pack_linear(weight, bias, strict=True)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(normed, sum) of x [R, n]; the sum is written to `residual`."""
        kind, size, row_bytes = _rows(x)
        rows, n = x.shape
        assert weight.shape == (n,)
        assert weight.dtype == x.dtype
        assert weight.is_contiguous()
        out = torch.empty((rows, n), dtype=x.dtype)
        address = residual_bytes = 0
        if residual is not None:
            assert residual.shape == x.shape
            assert residual.dtype == x.dtype
            address, residual_bytes = residual.data_ptr(), _rows(residual)[2]
        step = max(1, UNIT_BYTES // (n * size))
        words = (rows, step, n, _float_bits(eps), weight.data_ptr(), x.data_ptr(), row_bytes, out.data_ptr())
        jit_rows.rms_norm(kind, -(-rows // step), (*words, address, residual_bytes))
        return out, x if residual is None else residual

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """x [R, n] -> [R, n]."""
        kind, size, row_bytes = _rows(x)
        rows, n = x.shape
        assert weight.shape == bias.shape == (n,)
        assert weight.dtype == bias.dtype == x.dtype
        assert weight.is_contiguous()
        assert bias.is_contiguous()
        out = torch.empty((rows, n), dtype=x.dtype)
        step = max(1, UNIT_BYTES // (n * size))
        words = (rows, step, n, _float_bits(eps), weight.data_ptr(), bias.data_ptr(), x.data_ptr(), row_bytes)
        jit_rows.layer_norm(kind, -(-rows // step), (*words, out.data_ptr()))
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[R, 2 F] -> [R, F]."""
        kind, size, row_bytes = _rows(gate_up)
        rows, n = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((rows, n), dtype=gate_up.dtype)
        step = max(1, UNIT_BYTES // (n * size))
        words = (rows, step, n, gate_up.data_ptr(), row_bytes, out.data_ptr())
        jit_rows.silu_mul(kind, -(-rows // step), words)
        return out

    def rotary(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        """Rotate q [R, H, D] and k [R, K, D] in place; both may be views into a wider row."""
        assert q.dtype == k.dtype
        assert q.stride(2) == k.stride(2) == 1
        assert positions.dtype == torch.int64
        assert positions.is_contiguous()
        assert cos_sin.dtype == torch.float32
        assert cos_sin.is_contiguous()
        rows, half = q.shape[0], cos_sin.shape[2]
        assert 2 * half <= q.shape[2]
        size = q.element_size()
        step = max(1, UNIT_BYTES // (size * (q.shape[1] + k.shape[1]) * 2 * half))
        words = [rows, step, half, positions.data_ptr(), cos_sin.data_ptr()]
        for x in (q, k):
            words += [x.data_ptr(), x.shape[1], x.stride(0) * size, x.stride(1) * size]
        jit_rows.rotary(KINDS[q.dtype], -(-rows // step), tuple(words))

    def kv_store(self, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        """Write k, v [R, K, D] to slots of k_cache, v_cache [N, K, B, D]; slots are distinct."""
        assert k.dtype == v.dtype == k_cache.dtype == v_cache.dtype
        assert k.stride(2) == v.stride(2) == k_cache.stride(3) == v_cache.stride(3) == 1
        assert slot_mapping.dtype == torch.int64
        assert slot_mapping.is_contiguous()
        rows, heads, dim = k.shape
        size = k.element_size()
        step = max(1, UNIT_BYTES // (2 * heads * dim * size))
        words = [rows, step, slot_mapping.data_ptr(), k_cache.shape[2], heads, dim * size]
        for x, cache in ((k, k_cache), (v, v_cache)):
            words += [x.data_ptr(), x.stride(0) * size, x.stride(1) * size, cache.data_ptr()]
            words += [stride * size for stride in cache.stride()[:3]]
        jit_rows.kv_store(0, -(-rows // step), tuple(words))

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMeta,
        scale: float,
        sliding_window: int | None = None,
    ) -> Tensor:
        """q [R, H, D] over the pool -> [R, H, D]; see `jit_attention`."""
        assert q.dtype == k_cache.dtype == v_cache.dtype
        assert q.stride(2) == k_cache.stride(3) == v_cache.stride(3) == 1
        rows, heads, dim = q.shape
        kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
        group = heads // kv_heads
        kind, size = KINDS[q.dtype], q.element_size()
        out = torch.empty((rows, heads, dim), dtype=q.dtype)
        runs, longest = self._runs(meta, max(1, jit_pool.MAX_VECTORS // group))
        in_place = all(
            jit_pool.reads_in_place(kind, dim, block_size, cache.stride(2) * size)
            for cache in (k_cache, v_cache)
        )
        bytes_per_thread = jit_pool.scratch_bytes(longest * group, dim)
        units = len(runs) * kv_heads
        words = [units, runs.ctypes.data, kv_heads, group, dim, block_size]
        words += [sliding_window or UNBOUNDED, _float_bits(scale * LOG2_E)]
        words += [q.data_ptr(), q.stride(0) * size, q.stride(1) * size, out.data_ptr()]
        for cache in (k_cache, v_cache):
            words += [cache.data_ptr(), *(stride * size for stride in cache.stride()[:3])]
        words += [meta.block_tables.data_ptr(), meta.block_tables.shape[1], meta.positions.data_ptr()]
        words += [scratch(bytes_per_thread * torch.get_num_threads()), bytes_per_thread, int(in_place)]
        if units:
            jit_attention.paged_attention(kind, units, tuple(words))
        return out

    def _runs(self, meta: AttentionMeta, rows_per_run: int) -> tuple[np.ndarray, int]:
        """[runs, 3] int32 (entry, first row, rows), longest work first, and the rows of the longest run."""
        known = getattr(self._local, "runs", None)
        if known is not None and known[0] is meta and known[1] == rows_per_run:
            return known[2], known[3]
        for x in (meta.cu_seqlens_q, meta.block_tables):
            assert x.dtype == torch.int32
            assert x.is_contiguous()
        assert meta.positions.dtype == torch.int64
        assert meta.positions.is_contiguous()
        cu = meta.cu_seqlens_q.numpy()
        lengths = np.diff(cu)
        counts = -(-lengths // rows_per_run)
        entry = np.repeat(np.arange(len(lengths)), counts)
        first = (np.arange(len(entry)) - np.repeat(np.cumsum(counts) - counts, counts)) * rows_per_run
        rows = np.minimum(lengths[entry] - first, rows_per_run)
        runs = np.stack([entry, cu[entry] + first, rows], axis=1)[::-1].astype(np.int32, order="C")
        longest = int(rows.max()) if len(rows) else 0
        self._local.runs = (meta, rows_per_run, runs, longest)
        return runs, longest

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """logits [S, V] -> token ids [S]."""
        return sample(logits, batch)

    def logprobs(self, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, ...]:
        """(logprob [S], rank [S], top ids [S, num_top], top logprobs [S, num_top])."""
        return logprobs(logits, token_ids, num_top)
