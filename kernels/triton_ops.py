"""The GPU body: Triton kernels, and torch's operations in the place of one that does not compile.

Linear layers are the library's, whose rounding depends on the batch; with `deterministic` they are kernels of
one tile, attention takes the tiles that give decode and chunks the same sums, and a kernel that does not
compile is an error, since torch's operations promise no bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from subprocess import CalledProcessError
from typing import TypeVar

import torch
from torch import Tensor
from triton.errors import TritonError

from ellm.kernels import (
    composed,
    triton_copy,
    triton_heads,
    triton_linear,
    triton_rows,
    triton_tiles,
    triton_tokens,
)
from ellm.kernels.ops import AttentionMeta, HeadTransform, KernelError, Linear, SamplingBatch
from ellm.kernels.reference import TorchOps

log = logging.getLogger(__name__)

T = TypeVar("T")

# Of the compiler, of the assembler, of the C compiler that builds a launcher, and of a kernel too large for
# the device. All are raised before anything runs.
COMPILE_ERRORS = (TritonError, RuntimeError, CalledProcessError, OSError)
DEVICE_ERRORS = tuple(
    getattr(torch, name) for name in ("OutOfMemoryError", "AcceleratorError") if hasattr(torch, name)
)


class TritonOps:
    """The `Ops` table in Triton."""

    name = "triton"

    def __init__(self, device: str, *, deterministic: bool = False, fused: bool = False) -> None:
        """device: where the tensors will be, "cuda:1" for example. fused: where rows of a hole are computed
        again, one launch has their attention and that of decode rows."""
        self.deterministic = deterministic
        self._fused = fused
        self._torch = TorchOps()
        self._index = torch.device(device).index  # None: the thread's current device
        self._broken: set[str] = set()

    @property
    def broken(self) -> frozenset[str]:
        """The kernels that did not compile."""
        return frozenset(self._broken)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Pack weight [out, in] and bias [out]; the layout is the device's fastest."""
        if not self.deterministic:
            return self._torch.linear(weight, bias)
        return _StrictLinear(self, weight, bias)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(normed, sum) of x [R, n]; the sum is written to `residual`."""
        return self._run(
            "rms_norm",
            lambda: triton_rows.rms_norm(x, weight, eps, residual),
            lambda: self._torch.rms_norm(x, weight, eps, residual),
        )

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """x [R, n] -> [R, n]."""
        return self._run(
            "layer_norm",
            lambda: triton_rows.layer_norm(x, weight, bias, eps),
            lambda: self._torch.layer_norm(x, weight, bias, eps),
        )

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[R, 2 F] -> [R, F]."""
        return self._run(
            "silu_mul",
            lambda: triton_rows.silu_mul(gate_up),
            lambda: self._torch.silu_mul(gate_up),
        )

    def rotary(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        """Rotate q [R, H, D] and k [R, K, D] in place; both may be views into a wider row."""
        self._run(
            "rotary",
            lambda: triton_rows.rotary(q, k, positions, cos_sin),
            lambda: self._torch.rotary(q, k, positions, cos_sin),
        )

    def kv_store(self, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        """Write k, v [R, K, D] to slots of k_cache, v_cache [N, K, B, D]; slots are distinct."""
        self._run(
            "kv_store",
            lambda: triton_rows.kv_store(k, v, slot_mapping, k_cache, v_cache),
            lambda: self._torch.kv_store(k, v, slot_mapping, k_cache, v_cache),
        )

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
        if not triton_heads.handles(heads):
            return composed.rotary_store(self, q, k, v, meta, kv, heads)
        return self._run(
            "rotary_store",
            lambda: triton_heads.rotary_store(q, k, v, meta, kv, heads),
            lambda: composed.rotary_store(self, q, k, v, meta, kv, heads),
        )

    def kv_copy(self, source: Tensor, target: Tensor, pairs: Tensor) -> None:
        """Blocks pairs[:, 0] of source [L, 2, *, K, B, D] to blocks pairs[:, 1] of target."""
        self._run(
            "kv_copy",
            lambda: triton_copy.kv_copy(source, target, pairs),
            lambda: composed.kv_copy(source, target, pairs),
            instead="a copy by torch",
        )

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMeta,
        scale: float,
        sliding_window: int | None = None,
    ) -> Tensor:
        """q [R, H, D] over the pool -> [R, H, D]; see `triton_attention`."""
        group = q.shape[1] // k_cache.shape[1]
        choice = triton_tiles.served_choice(q.dtype, q.shape[2], group, self.deterministic, self._fused)
        args = (q, k_cache, v_cache, meta, scale, sliding_window)
        if triton_tiles.fuses(meta, choice) and "fused attention" not in self._broken:
            return self._run(
                "fused attention",
                lambda: triton_tiles.paged_attention(*args, choice),
                lambda: self.paged_attention(*args),
                instead="two launches",
            )
        return self._run(
            "paged_attention",
            lambda: triton_tiles.paged_attention(*args, triton_tiles.apart(choice)),
            lambda: self._torch.paged_attention(*args),
        )

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """logits [S, V] -> token ids [S]; see `triton_sampling`."""
        return self._run(
            "sample",
            lambda: triton_tokens.sample(logits, batch),
            lambda: self._torch.sample(logits, batch),
        )

    def logprobs(self, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, ...]:
        """(logprob [S], rank [S], top ids [S, num_top], top logprobs [S, num_top])."""
        return self._run(
            "logprobs",
            lambda: triton_tokens.logprobs(logits, token_ids, num_top),
            lambda: self._torch.logprobs(logits, token_ids, num_top),
        )

    def strict_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [R, in], weight [out, in], bias [out] -> [R, out], each row with the same bits in any batch."""
        return self._run(
            "linear",
            lambda: triton_linear.linear(x, weight, bias),
            lambda: self._torch.linear(weight, bias)(x),
        )

    def _run(
        self, name: str, kernel: Callable[[], T], twin: Callable[[], T], *, instead: str | None = None
    ) -> T:
        """The kernel; from its first failure to compile on, its twin.

        `instead`: what the twin is, where it has the kernel's bits. Where it has not, and they are promised,
        raises KernelError.
        """
        if name in self._broken:
            return twin()
        try:
            # Triton launches on the thread's current device, wherever the tensors are.
            with nullcontext() if self._index is None else torch.cuda.device(self._index):
                return kernel()
        except DEVICE_ERRORS:
            raise
        except COMPILE_ERRORS as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if self.deterministic and instead is None:
                raise KernelError(
                    f"deterministic=True: the Triton kernel {name} does not compile, and nothing else has "
                    f"its bits: {reason}"
                ) from error
            self._broken.add(name)
            by = instead or "torch"
            log.warning("the Triton kernel %s does not compile, %s in its place: %s", name, by, reason)
            return twin()


class _StrictLinear:
    """One layer's weight [out, in] and bias [out]."""

    def __init__(self, ops: TritonOps, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._ops, self._weight, self._bias = ops, weight.contiguous(), bias

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, in_features] -> [R, out_features]."""
        return self._ops.strict_linear(x, self._weight, self._bias)
