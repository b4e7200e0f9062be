"""OPT: learned positions, layer norm before or after each part, ReLU, embeddings that may be projected."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from ellm.kernels.ops import Linear, Ops
from ellm.worker.model.architecture import Architecture
from ellm.worker.model.computation import Communicator, Computation, Stop
from ellm.worker.model.layers import Attention, LmHead, VocabEmbedding, joined_linear
from ellm.worker.model.loader import WeightReader
from ellm.worker.model.weights import LM_HEAD, OPT_EMBED, OPT_POSITION_OFFSET

_ROOT = "model.decoder"


class _LayerNorm:
    def __init__(self, ops: Ops, arch: Architecture, reader: WeightReader, name: str) -> None:
        self._ops = ops
        self._eps = arch.norm_eps
        self._weight = reader.read(f"{name}.weight")
        self._bias = reader.read(f"{name}.bias")

    def __call__(self, x: Tensor) -> Tensor:
        return self._ops.layer_norm(x, self._weight, self._bias, self._eps)


class OptLayer:
    """x += part(norm(x)), or x = norm(x + part(x)) in the post-norm models (OPT-350M)."""

    def __init__(self, ops: Ops, arch: Architecture, reader: WeightReader, index: int) -> None:
        name = f"{_ROOT}.layers.{index}"
        self._pre_norm = arch.pre_norm
        self._attention = Attention(ops, arch, reader, f"{name}.self_attn", None)
        self._attention_norm = _LayerNorm(ops, arch, reader, f"{name}.self_attn_layer_norm")
        self._fc1 = joined_linear(ops, reader, f"{name}.fc1")
        self._fc2 = joined_linear(ops, reader, f"{name}.fc2")
        self._mlp_norm = _LayerNorm(ops, arch, reader, f"{name}.final_layer_norm")

    def __call__(self, x: Tensor, rows: Tensor | None) -> Generator[Stop, Tensor, Tensor]:
        """x [R, hidden] -> [R, hidden], or of `rows` alone where given."""
        normed = self._attention_norm(x) if self._pre_norm else x
        attended = yield (yield from self._attention(normed, None, rows))
        x = (x if rows is None else x.index_select(0, rows)) + attended
        if self._pre_norm:
            return x + (yield self._mlp(self._mlp_norm(x)))
        x = self._attention_norm(x)
        return self._mlp_norm(x + (yield self._mlp(x)))

    def _mlp(self, x: Tensor) -> Tensor:
        return self._fc2(torch.relu_(self._fc1(x)))


class OptModel:
    """Weights packed at construction; `forward` keeps no state beyond the pool it is handed."""

    def __init__(
        self,
        ops: Ops,
        arch: Architecture,
        reader: WeightReader,
        max_model_len: int,
        communicator: Communicator,
    ) -> None:
        """`arch`: of this rank."""
        del max_model_len  # the position table has the checkpoint's length
        embed = reader.read(OPT_EMBED)
        self._embed = VocabEmbedding(embed, communicator)
        self._positions = reader.read(f"{_ROOT}.embed_positions.weight")[OPT_POSITION_OFFSET:]
        projected = arch.embed_dim != arch.hidden_size
        self._project_in: Linear | None = None
        self._project_out: Linear | None = None
        if projected:
            self._project_in = joined_linear(ops, reader, f"{_ROOT}.project_in")
            self._project_out = joined_linear(ops, reader, f"{_ROOT}.project_out")
        self._layers = [OptLayer(ops, arch, reader, i) for i in range(arch.num_layers)]
        self._final_norm = (
            _LayerNorm(ops, arch, reader, f"{_ROOT}.final_layer_norm") if arch.pre_norm else None
        )
        head = embed if arch.tie_word_embeddings else reader.read(LM_HEAD)
        self._head = LmHead(ops, head, arch.vocab_size, communicator)

    def forward(self, token_ids: Tensor, positions: Tensor, rows: Tensor | None) -> Computation:
        x = yield self._embed(token_ids)
        if self._project_in is not None:
            x = self._project_in(x)
        x = x + torch.nn.functional.embedding(positions, self._positions)
        last = len(self._layers) - 1
        for i, layer in enumerate(self._layers):
            x = yield from layer(x, rows if i == last else None)
        if self._final_norm is not None:
            x = self._final_norm(x)
        return x if self._project_out is None else self._project_out(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)

    def likeliest(self, hidden: Tensor) -> Tensor:
        return self._head.likeliest(hidden)
