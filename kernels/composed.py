"""Operations that are made of others of the same body, where it has no kernel that does them at once."""

from __future__ import annotations

from torch import Tensor

from ellm.kernels.ops import AttentionMeta, HeadTransform, Ops


def rotary_store(
    ops: Ops,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    meta: AttentionMeta,
    kv: tuple[Tensor, Tensor],
    heads: HeadTransform,
) -> Tensor:
    """Norm and rotate q [R, H, D] and k [R, K, D], store k and v; returns q. See `Ops.rotary_store`."""
    if heads.q_norm is not None:
        q = _norm_heads(ops, q, heads.q_norm, heads.eps)
    if heads.k_norm is not None:
        k = _norm_heads(ops, k, heads.k_norm, heads.eps)
    if heads.cos_sin is not None:
        ops.rotary(q, k, meta.positions, heads.cos_sin)
    ops.kv_store(k, v, meta.slot_mapping, *kv)
    return q


def _norm_heads(ops: Ops, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [R, H, D] normed head by head, in memory of its own."""
    flat, _ = ops.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps)
    return flat.view(x.shape)


def kv_copy(source: Tensor, target: Tensor, pairs: Tensor) -> None:
    """Blocks from one array to another; see `Ops.kv_copy`."""
    if len(pairs):
        blocks = source[:, :, pairs[:, 0].to(source.device)]
        target[:, :, pairs[:, 1]] = blocks.to(target.device)
