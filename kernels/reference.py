"""The torch body: a twin of every operation in plain torch, batched, on any device.

It is the yardstick of the other bodies and the path where no JIT is present. It makes no promise about
rounding: torch picks loops and reductions by the shape of the whole batch, so `deterministic` is False.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ellm.kernels import composed
from ellm.kernels.ops import AttentionMeta, HeadTransform, Linear, SamplingBatch
from ellm.kernels.packed_linear import pack_linear
from ellm.kernels.reference_attention import paged_attention
from ellm.kernels.reference_sampling import logprobs, sample


class TorchOps:
    """The `Ops` table in plain torch."""

    name = "torch"
    deterministic = False

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Pack weight [out, in] and bias [out]; the layout is the device's fastest."""
        return pack_linear(weight, bias)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(normed, sum) of x [R, n]; the sum is rounded to x's dtype before it is normed."""
        total = x if residual is None else residual.add_(x)
        wide = total.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * scale * weight.float()).to(x.dtype), total

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """x [R, n] -> [R, n]."""
        normed = F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps)
        return normed.to(x.dtype)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[R, 2 F] -> [R, F]."""
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (F.silu(gate) * up).to(gate_up.dtype)

    def rotary(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        """Rotate q [R, H, D] and k [R, K, D] in place; both may be views into a wider row."""
        cos, sin = cos_sin[positions].unsqueeze(1).unbind(2)  # each [R, 1, rotary_dim / 2]
        half = cos.shape[-1]
        for x in (q, k):
            first, second = x[..., :half].float(), x[..., half : 2 * half].float()
            rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
            x[..., : 2 * half] = rotated.to(x.dtype)

    def kv_store(self, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        """Write k, v [R, K, D] to slots of k_cache, v_cache [N, K, B, D]; slots are distinct."""
        block_size = k_cache.shape[2]
        blocks = slot_mapping // block_size
        offsets = slot_mapping % block_size
        k_cache[blocks, :, offsets] = k
        v_cache[blocks, :, offsets] = v

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
        return composed.rotary_store(self, q, k, v, meta, kv, heads)

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
        """q [R, H, D] -> [R, H, D]; see `reference_attention`."""
        return paged_attention(q, k_cache, v_cache, meta, scale, sliding_window)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """logits [S, V] -> token ids [S]; see `reference_sampling`."""
        return sample(logits, batch)

    def logprobs(self, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, ...]:
        """(logprob [S], rank [S], top ids [S, num_top], top logprobs [S, num_top])."""
        return logprobs(logits, token_ids, num_top)
