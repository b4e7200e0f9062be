"""Others' attention on the same shapes: torch's FlashAttention, and FlashInfer's where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

WORKSPACE_BYTES = 256 << 20
Call = Callable[[], Any]


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """Causal attention of q [1, H, n, D] over k, v [1, K, n, D] by torch's FlashAttention alone. Raises
    RuntimeError where it does not have these shapes; heads are repeated where it does not group them."""
    group = q.shape[1] // k.shape[1]

    def attend(k: Tensor, v: Tensor, *, grouped: bool) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out: Tensor = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=grouped
            )
        return out

    try:
        attend(k, v, grouped=True)
    except RuntimeError:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        attend(k, v, grouped=False)
        return lambda: attend(k, v, grouped=False)
    return lambda: attend(k, v, grouped=True)


def chosen_attention(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """The same by what torch takes for these shapes."""
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def flashinfer_decode(q: Tensor, pools: Tensor, tables: Tensor, tokens: int) -> Call:
    """q [n, H, D], a row of each sequence, over `tokens` tokens of each in pools [2, N, K, B, D]; tables [n,
    blocks] int32. Raises RuntimeError where FlashInfer is absent or cannot."""
    flashinfer = _flashinfer()
    (count, heads, dim), (_, _, kv_heads, size, _) = q.shape, pools.shape
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    each = torch.arange(count + 1, dtype=torch.int32, device=q.device)
    last = torch.full_like(each[1:], (tokens - 1) % size + 1)
    places = (each * tables.shape[1], tables.flatten(), last)
    types = {"q_data_type": q.dtype, "kv_data_type": pools.dtype}
    wrapper.plan(*places, heads, kv_heads, dim, size, pos_encoding_mode="NONE", **types)
    return lambda: wrapper.run(q, (pools[0], pools[1]))


def flashinfer_prefill(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """q [1, H, n, D] over k, v [1, K, n, D], causal. Raises RuntimeError as above."""
    flashinfer = _flashinfer()
    rows = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
    return lambda: flashinfer.single_prefill_with_kv_cache(*rows, causal=True)


def _flashinfer() -> Any:
    if find_spec("flashinfer") is None:
        raise RuntimeError("FlashInfer is not installed")
    import flashinfer  # type: ignore[import-not-found]

    return flashinfer
