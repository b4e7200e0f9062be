"""The GPU body: Triton kernels where there are, torch's for the rest, and torch's where one does not compile.

Linear layers and sampling are torch's (the library's matrix product; the reference's sampling). Results of a
row do not depend on the batch beyond the rounding of the linear layers; those are not STRICT, so the body is
not.
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

from ellm.kernels import triton_rows, triton_tiles
from ellm.kernels.ops import AttentionMeta, Linear, SamplingBatch
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
    deterministic = False

    def __init__(self, device: str) -> None:
        """device: where the tensors will be, "cuda:1" for example."""
        self._torch = TorchOps()
        self._index = torch.device(device).index  # None: the thread's current device
        self._broken: set[str] = set()

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Pack weight [out, in] and bias [out]; the layout is the device's fastest."""
        return self._torch.linear(weight, bias)

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
        return self._run(
            "paged_attention",
            lambda: triton_tiles.paged_attention(q, k_cache, v_cache, meta, scale, sliding_window),
            lambda: self._torch.paged_attention(q, k_cache, v_cache, meta, scale, sliding_window),
        )

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """logits [S, V] -> token ids [S]; the reference's."""
        return self._torch.sample(logits, batch)

    def logprobs(self, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, ...]:
        """(logprob [S], rank [S], top ids [S, num_top], top logprobs [S, num_top]); the reference's."""
        return self._torch.logprobs(logits, token_ids, num_top)

    def _run(self, name: str, kernel: Callable[[], T], twin: Callable[[], T]) -> T:
        """The kernel; from its first failure to compile on, its twin."""
        if name in self._broken:
            return twin()
        try:
            # Triton launches on the thread's current device, wherever the tensors are.
            with nullcontext() if self._index is None else torch.cuda.device(self._index):
                return kernel()
        except DEVICE_ERRORS:
            raise
        except COMPILE_ERRORS as error:
            self._broken.add(name)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("the Triton kernel %s does not compile, torch takes its place: %s", name, reason)
            return twin()
