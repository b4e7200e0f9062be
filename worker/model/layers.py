"""What every decoder is made of, written on the table of operations alone.

R rows of one flat batch; which sequence a row belongs to is in the AttentionMeta and nowhere else.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Protocol

import torch
from torch import Tensor

from ellm.kernels.ops import AttentionMeta, HeadTransform, Linear, Ops, SamplingBatch
from ellm.worker.model.architecture import Architecture
from ellm.worker.model.computation import AttentionCall, Communicator, Computation, Stop
from ellm.worker.model.loader import WeightReader
from ellm.worker.model.rope import RopeConfig

LayerKV = tuple[Tensor, Tensor]  # keys, values: each [N, K, B, D]
LayerStep = tuple[AttentionMeta, LayerKV]  # what one layer of a step works on
GREEDY = SamplingBatch(None, None, None, None, None, None, None)


class CausalModel(Protocol):
    """A model as the runner sees it."""

    def forward(self, token_ids: Tensor, positions: Tensor, rows: Tensor | None) -> Computation:
        """token_ids, positions [R] int64 -> final hidden states, of `rows` [n] int64 alone where given:
        [n or R, E]. It yields this rank's part of every sum, and one AttentionCall for each layer, of all R
        rows."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, E] -> [n, V] in the model's dtype, the same on every rank."""
        ...

    def likeliest(self, hidden: Tensor) -> Tensor:
        """[n, E] -> ids [n] int64 of the largest logits, the lowest id of equals."""
        ...


class PoolAttention:
    """Answers the calls of one computation from the pool. `steps`: one for each layer, asked for only when
    the attention of the layer before has been asked for."""

    def __init__(self, ops: Ops, steps: Iterable[LayerStep]) -> None:
        self._ops = ops
        self._steps = iter(steps)

    def __call__(self, call: AttentionCall) -> Tensor:
        """Keys and values of all R rows reach the pool; -> [R, H, D]."""
        meta, kv = next(self._steps)
        q = self._ops.rotary_store(call.q, call.k, call.v, meta, kv, call.heads)
        return self._ops.paged_attention(q, kv[0], kv[1], meta, call.scale, call.window)

    def store(self, call: AttentionCall) -> None:
        """The same without attention."""
        meta, kv = next(self._steps)
        self._ops.rotary_store(call.q, call.k, call.v, meta, kv, call.heads)


def joined_linear(ops: Ops, reader: WeightReader, *names: str) -> Linear:
    """One linear that computes several of the checkpoint's at once, outputs side by side."""
    weight, bias = reader.joined(list(names))
    return ops.linear(weight, bias)


def rotary_table(rope: RopeConfig, max_positions: int, device: torch.device) -> Tensor:
    """cos and sin of every position: [max_positions, 2, rotary_dim / 2] float32."""
    frequencies = torch.tensor(rope.inverse_frequencies(), dtype=torch.float32)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=1).to(device)


class VocabEmbedding:
    """Rows of the embedding table; of a rank's share of the vocabulary where there are several."""

    def __init__(self, weight: Tensor, communicator: Communicator) -> None:
        """weight [V / ranks, E], padded."""
        self.weight = weight
        self._first = communicator.shard.rank * weight.shape[0]
        self._whole = communicator.shard.size == 1

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[R] -> [R, E]: this rank's part of the sum, which is 0 where another rank has the token."""
        if self._whole:
            return torch.nn.functional.embedding(token_ids, self.weight)
        local = token_ids - self._first
        strange = (local < 0) | (local >= self.weight.shape[0])
        rows = torch.nn.functional.embedding(local.masked_fill_(strange, 0), self.weight)
        return rows.masked_fill_(strange.unsqueeze(1), 0.0)


class LmHead:
    """Logits of all the vocabulary, on every rank, from each rank's share."""

    def __init__(self, ops: Ops, weight: Tensor, vocab_size: int, communicator: Communicator) -> None:
        """weight [V / ranks, E], padded."""
        self._ops = ops
        self._linear = ops.linear(weight, None)
        self._vocab_size = vocab_size
        self._communicator = communicator
        self._first = communicator.shard.rank * weight.shape[0]
        self._own = min(weight.shape[0], vocab_size - self._first)  # without the padding

    def __call__(self, hidden: Tensor) -> Tensor:
        """[n, E] -> [n, V]."""
        logits = self._communicator.join_columns(self._linear(hidden))
        return logits if logits.shape[1] == self._vocab_size else logits[:, : self._vocab_size]

    def likeliest(self, hidden: Tensor) -> Tensor:
        """[n, E] -> ids [n] int64; of several ranks each tells its own largest logit alone."""
        logits = self._linear(hidden)[:, : self._own]
        ids = self._ops.sample(logits, GREEDY)
        size = self._communicator.shard.size
        if size == 1:
            return ids
        largest = logits.gather(1, ids.unsqueeze(1)).double()
        told = self._communicator.join_columns(torch.cat((largest, (ids + self._first).unsqueeze(1)), 1))
        best, chosen = told[:, 0], told[:, 1]
        for rank in range(1, size):  # a later rank's ids are higher: it must have more than an equal
            value, its_id = told[:, 2 * rank], told[:, 2 * rank + 1]
            chosen = torch.where(value > best, its_id, chosen)
            best = torch.maximum(value, best)
        return chosen.long()


class Attention:
    """Joined projection, a call for store and attention with optional q/k norm and rotation, output
    projection, all of a rank's own heads: the result is a part of the sum over all ranks."""

    def __init__(
        self, ops: Ops, arch: Architecture, reader: WeightReader, name: str, window: int | None
    ) -> None:
        self._heads = [arch.num_heads, arch.num_kv_heads, arch.num_kv_heads]
        self._all_heads = sum(self._heads)
        self._head_dim = arch.head_dim
        self._scale = arch.head_dim**-0.5
        self._eps = arch.norm_eps
        self._window = window
        self._qkv = joined_linear(ops, reader, *(f"{name}.{p}_proj" for p in "qkv"))
        self._out = joined_linear(ops, reader, f"{name}.{'out' if arch.family == 'opt' else 'o'}_proj")
        self._q_norm = reader.optional(f"{name}.q_norm.weight")
        self._k_norm = reader.optional(f"{name}.k_norm.weight")

    def __call__(
        self, x: Tensor, cos_sin: Tensor | None, rows: Tensor | None = None
    ) -> Generator[Stop, Tensor, Tensor]:
        """x [R, hidden] -> [R, hidden], or [n, hidden] for `rows` [n] alone; all R rows reach the pool."""
        qkv = self._qkv(x).view(-1, self._all_heads, self._head_dim)
        q, k, v = qkv.split_with_sizes(self._heads, 1)  # views: [R, H, D], [R, K, D] twice
        heads = HeadTransform(self._q_norm, self._k_norm, self._eps, cos_sin)
        out = yield AttentionCall(q, k, v, heads, self._scale, self._window)
        if rows is not None:
            out = out.index_select(0, rows)
        return self._out(out.view(out.shape[0], -1))


class GatedMlp:
    """down(silu(gate(x)) * up(x)), gate and up in one linear; of a rank's columns, a part of the sum."""

    def __init__(self, ops: Ops, reader: WeightReader, name: str) -> None:
        self._ops = ops
        self._gate_up = joined_linear(ops, reader, f"{name}.gate_proj", f"{name}.up_proj")
        self._down = joined_linear(ops, reader, f"{name}.down_proj")

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._ops.silu_mul(self._gate_up(x)))
