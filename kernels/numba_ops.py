"""The CPU body: jitted loops over rows. Every tensor is checked here; the kernels see addresses.

The loops are STRICT by their nature. Only the linear layers have a choice, where they are the library's:
without STRICT they are left as it runs them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ellm.kernels import composed, jit_rows
from ellm.kernels.jit_memory import KINDS
from ellm.kernels.numba_attention import UNIT_BYTES, check_indices, float_bits, kv_store, paged_attention
from ellm.kernels.numba_linear import JitLinear, suits_processor
from ellm.kernels.numba_sampling import logprobs, sample
from ellm.kernels.ops import AttentionMeta, HeadTransform, Linear, SamplingBatch
from ellm.kernels.packed_linear import pack_linear


def _row_bytes(x: Tensor, dtype: torch.dtype, n: int) -> int:
    """From row to row of x [R, n], whose elements lie side by side."""
    by_row, by_element = x.stride()
    assert by_element == 1 or n == 1
    assert x.shape[1] == n
    assert x.dtype == dtype
    assert x.is_cpu
    return by_row * x.element_size()


def _vector(x: Tensor, dtype: torch.dtype, n: int) -> int:
    """The address of x [n]."""
    assert x.shape == (n,)
    assert x.dtype == dtype
    assert x.is_contiguous()
    return x.data_ptr()


def _norm_heads(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [R, H, D], whose rows may lie apart, normed head by head, in memory of its own."""
    rows, heads, dim = x.shape
    by_row, by_head, by_dim = x.stride()
    assert by_dim == 1
    assert x.is_cpu
    out, size = torch.empty((rows, heads, dim), dtype=x.dtype), x.element_size()
    step = max(1, UNIT_BYTES // (dim * size))
    words: tuple[int, ...] = (rows * heads, step, dim, float_bits(eps), _vector(weight, x.dtype, dim))
    words = (*words, x.data_ptr(), by_row * size, out.data_ptr(), 0, 0, heads, by_head * size)
    jit_rows.rms_norm(KINDS[x.dtype], -(-rows * heads // step), words)
    return out


class NumbaOps:
    """The `Ops` table in numba, on torch's threads."""

    name = "numba"

    def __init__(self, deterministic: bool = True) -> None:
        self.deterministic = deterministic

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Lay out weight [out, in] and bias [out]: for `jit_linear` where it suits the processor, else for
        oneDNN (`packed_linear`)."""
        if suits_processor(weight.dtype):
            return JitLinear(weight, bias)
        return pack_linear(weight, bias, strict=self.deterministic)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(normed, sum) of x [R, n]; the sum is written to `residual`."""
        rows, n = x.shape
        dtype = x.dtype
        out = torch.empty((rows, n), dtype=dtype)
        step = max(1, UNIT_BYTES // (n * x.element_size()))
        words: tuple[int, ...] = (rows, step, n, float_bits(eps), _vector(weight, dtype, n))
        words = (*words, x.data_ptr(), _row_bytes(x, dtype, n), out.data_ptr())
        if residual is None:
            jit_rows.rms_norm(KINDS[dtype], -(-rows // step), (*words, 0, 0, 1, 0))
            return out, x
        assert residual.shape[0] == rows
        words = (*words, residual.data_ptr(), _row_bytes(residual, dtype, n), 1, 0)
        jit_rows.rms_norm(KINDS[dtype], -(-rows // step), words)
        return out, residual

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """x [R, n] -> [R, n]."""
        rows, n = x.shape
        dtype = x.dtype
        out = torch.empty((rows, n), dtype=dtype)
        step = max(1, UNIT_BYTES // (n * x.element_size()))
        words: tuple[int, ...] = (
            rows,
            step,
            n,
            float_bits(eps),
            _vector(weight, dtype, n),
            _vector(bias, dtype, n),
        )
        words = (*words, x.data_ptr(), _row_bytes(x, dtype, n), out.data_ptr())
        jit_rows.layer_norm(KINDS[dtype], -(-rows // step), words)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[R, 2 F] -> [R, F]."""
        rows, width = gate_up.shape
        dtype, n = gate_up.dtype, width // 2
        out = torch.empty((rows, n), dtype=dtype)
        step = max(1, UNIT_BYTES // (n * gate_up.element_size()))
        words = (rows, step, n, gate_up.data_ptr(), _row_bytes(gate_up, dtype, 2 * n), out.data_ptr())
        jit_rows.silu_mul(KINDS[dtype], -(-rows // step), words)
        return out

    def rotary(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        """Rotate q [R, H, D] and k [R, K, D] in place; both may be views into a wider row."""
        rows, _, dim = q.shape
        limit, _, half = cos_sin.shape
        size = q.element_size()
        assert 2 * half <= dim
        assert k.dtype == q.dtype
        assert positions.shape == (rows,)
        assert k.shape[0] == rows
        assert cos_sin.dtype == torch.float32
        assert cos_sin.is_contiguous()
        words: tuple[int, ...] = (half, check_indices("positions", positions, limit), cos_sin.data_ptr())
        for x in (q, k):
            by_row, by_head, by_dim = x.stride()
            assert by_dim == 1
            words = (*words, x.data_ptr(), x.shape[1], by_row * size, by_head * size)
        step = max(1, UNIT_BYTES // (size * (q.shape[1] + k.shape[1]) * 2 * half))
        jit_rows.rotary(KINDS[q.dtype], -(-rows // step), (rows, step, *words))

    def kv_store(self, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        """Write k, v [R, K, D] to slots of k_cache, v_cache [N, K, B, D]; slots are distinct."""
        kv_store(k, v, slot_mapping, k_cache, v_cache)

    def rotary_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        meta: AttentionMeta,
        kv: tuple[Tensor, Tensor],
        heads: HeadTransform,
    ) -> Tensor:
        """Norm and rotate q [R, H, D] and k [R, K, D], store k and v; returns q."""
        if heads.q_norm is not None:
            q = _norm_heads(q, heads.q_norm, heads.eps)
        if heads.k_norm is not None:
            k = _norm_heads(k, heads.k_norm, heads.eps)
        rest = HeadTransform(None, None, heads.eps, heads.cos_sin)
        return composed.rotary_store(self, q, k, v, meta, kv, rest)

    def kv_copy(self, source: Tensor, target: Tensor, pairs: Tensor) -> None:
        """Blocks pairs[:, 0] of source [L, 2, *, K, B, D] to blocks pairs[:, 1] of target."""
        composed.kv_copy(source, target, pairs)

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
        return paged_attention(q, k_cache, v_cache, meta, scale, sliding_window)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """logits [S, V] -> token ids [S]."""
        return sample(logits, batch)

    def logprobs(self, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, ...]:
        """(logprob [S], rank [S], top ids [S, num_top], top logprobs [S, num_top])."""
        return logprobs(logits, token_ids, num_top)
