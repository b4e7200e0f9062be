"""The operations a model is written in. Each body (torch reference, numba, Triton) offers all of them.

Every row is computed alone: no operation's result for a row may depend on the other rows of the batch,
beyond rounding. A body with `deterministic` set keeps even the rounding: bitwise the same at any batch
mix and chunking (STRICT).

Sizes: R rows (tokens) of one flat batch, S sequences (entries), H query heads, K key/value heads, D head
dimension, N blocks of the pool, B tokens per block, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# KV pool of one layer: keys and values apart, each [N, K, B, D]: a block's tokens of one head lie together.


class KernelError(RuntimeError):
    """A kernel that nothing can stand in for cannot be had on this device."""


@dataclass(frozen=True, slots=True)
class AttentionMeta:
    """Where the rows of one step stand; built once per step, used by every layer."""

    cu_seqlens_q: Tensor  # [S + 1] int32: rows of entry i are [cu[i], cu[i + 1])
    kv_lens: Tensor  # [S] int32: tokens of entry i that are in the pool after this step's store
    block_tables: Tensor  # [S, max_blocks] int32, padded with 0
    positions: Tensor  # [R] int64: absolute position of each row; consecutive within an entry
    slot_mapping: Tensor  # [R] int64: block id * B + offset where the row's KV is stored
    num_decode: int  # the first num_decode entries have one row each
    max_kv_len: int
    row_entry: Tensor  # [R] int32: the entry each row belongs to
    num_recompute: int = 0  # the last num_recompute entries are rows of a hole, computed again for this step
    may_fuse: bool = True  # these and decode rows may share a launch, where the body has such a one


@dataclass(frozen=True, slots=True)
class HeadTransform:
    """What becomes of a layer's query and key heads before attention: norm, then rotation. None: nothing."""

    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    eps: float
    cos_sin: Tensor | None  # as `rotary` takes it


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How to sample S rows. Absent features are None, so that a plain greedy batch costs an argmax."""

    temperature: Tensor | None  # [S] float32; 0 is greedy. None: all greedy
    top_k: Tensor | None  # [S] int64; 0 is off
    top_p: Tensor | None  # [S] float32
    min_p: Tensor | None  # [S] float32
    seeds: Tensor | None  # [S] int64 (the unsigned seed's bits)
    choice_index: Tensor | None  # [S] int64
    output_index: Tensor | None  # [S] int64
    # Penalties of row i over token ids penalty_ids[penalty_cu[i]:penalty_cu[i + 1]] (each id once).
    penalty_cu: Tensor | None = None  # [S + 1] int64
    penalty_ids: Tensor | None = None  # [P] int64
    penalty_output_counts: Tensor | None = None  # [P] int64: occurrences in the output alone (0: prompt only)
    repetition: Tensor | None = None  # [S] float32
    presence: Tensor | None = None  # [S] float32
    frequency: Tensor | None = None  # [S] float32
    # Additions to the logits: row bias_row[j], token bias_ids[j] += bias[j] (-inf bans; min_tokens is this).
    bias_row: Tensor | None = None  # [Q] int64
    bias_ids: Tensor | None = None  # [Q] int64
    bias: Tensor | None = None  # [Q] float32
    # What rows may emit at all: row mask_row[j] only tokens whose bit (id % 32 of word id / 32) is set.
    mask_row: Tensor | None = None  # [M] int64, rising
    masks: Tensor | None = None  # [M, ceil(V / 32)] int32


class Linear(Protocol):
    """y = x W^T + b with the weight laid out for the device. Rows are independent of each other."""

    in_features: int
    out_features: int

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, in_features] -> [R, out_features], same dtype."""
        ...


class Ops(Protocol):
    """The table of operations of one body."""

    name: str  # "torch", "numba", "triton"
    deterministic: bool

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Pack weight [out, in] (and bias [out]) once, at load."""
        ...

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add x [R, n] to `residual` where given, then norm in float32.

        Returns (normed, sum); `sum` may reuse residual's memory. Without residual, sum is x.
        """
        ...

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """x [R, n] -> [R, n], statistics in float32."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[R, 2 F] (gate, then up) -> silu(gate) * up [R, F]."""
        ...

    def rotary(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        """Rotate q [R, H, D] and k [R, K, D] in place (half-split pairs, as Hugging Face).

        cos_sin [max_positions, 2, rotary_dim / 2] float32; rotary_dim <= D, the rest passes through.
        """
        ...

    def kv_store(self, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        """Write k, v [R, K, D] to the slots of k_cache, v_cache [N, K, B, D].

        Triton's kernels store nothing for a slot below 0, which no other body knows.
        """
        ...

    def rotary_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        meta: AttentionMeta,
        kv: tuple[Tensor, Tensor],
        heads: HeadTransform,
    ) -> Tensor:
        """Norm and rotate q [R, H, D] and k [R, K, D], each step rounded to their type, and write k and v to
        their slots of kv (k_cache, v_cache). Returns q as attention needs it; it may be q's memory, and what
        is left in q and k is undefined."""
        ...

    def kv_copy(self, source: Tensor, target: Tensor, pairs: Tensor) -> None:
        """target[:, :, pairs[i, 1]] = source[:, :, pairs[i, 0]]: blocks between arrays [L, 2, *, K, B, D].

        pairs [n, 2] int64, on the target's device; no target twice, none of them a source.
        """
        ...

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMeta,
        scale: float,
        sliding_window: int | None = None,
    ) -> Tensor:
        """Causal attention of q [R, H, D] over the pool; row at position p sees positions (p - window, p].

        Groups of H / K consecutive query heads share a key/value head. Returns [R, H, D] in q's dtype;
        scores and sums in float32, over KV tiles of fixed size in position order.
        """
        ...

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """logits [S, V] -> token ids [S] int64 (CPU or device).

        Order: bias, penalties, masks, then greedy argmax (lowest id wins a tie), or temperature, top-k,
        top-p, min-p and Gumbel noise from f(seed, choice index, output index, token id).
        """
        ...

    def logprobs(self, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, ...]:
        """logits [S, V], ids [S] -> (logprob, rank, top ids and top logprobs [S, num_top]).

        Ranks count from 1; ties go to the lower id.
        """
        ...
