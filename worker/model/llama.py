"""Llama 2/3, Mistral, Qwen2/2.5 and Qwen3: pre-norm decoders with rotary positions and gated MLPs.

They differ in biases, q/k norms, windows and frequencies, all of which the architecture says.
"""

from __future__ import annotations

from collections.abc import Generator

from torch import Tensor

from ellm.kernels.ops import Ops
from ellm.worker.model.architecture import Architecture
from ellm.worker.model.computation import Communicator, Computation, Stop
from ellm.worker.model.layers import Attention, GatedMlp, LmHead, VocabEmbedding, rotary_table
from ellm.worker.model.loader import WeightReader
from ellm.worker.model.weights import EMBED, LM_HEAD


class LlamaLayer:
    """x += attention(norm(x)); x += mlp(norm(x)), the sums carried beside the last part's output."""

    def __init__(self, ops: Ops, arch: Architecture, reader: WeightReader, index: int) -> None:
        name = f"model.layers.{index}"
        self._ops = ops
        self._eps = arch.norm_eps
        self._input_norm = reader.read(f"{name}.input_layernorm.weight")
        self._attention = Attention(ops, arch, reader, f"{name}.self_attn", arch.windows[index])
        self._post_norm = reader.read(f"{name}.post_attention_layernorm.weight")
        self._mlp = GatedMlp(ops, reader, f"{name}.mlp")

    def __call__(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, rows: Tensor | None
    ) -> Generator[Stop, Tensor, tuple[Tensor, Tensor]]:
        """x [R, hidden] is yet to be added to `residual`; so are the two returned, of `rows` where given."""
        normed, residual = self._ops.rms_norm(x, self._input_norm, self._eps, residual)
        x = yield (yield from self._attention(normed, cos_sin, rows))
        if rows is not None:
            residual = residual.index_select(0, rows)
        normed, residual = self._ops.rms_norm(x, self._post_norm, self._eps, residual)
        x = yield self._mlp(normed)
        return x, residual


class LlamaModel:
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
        assert arch.rope is not None
        self._ops = ops
        self._eps = arch.norm_eps
        embed = reader.read(EMBED)
        self._embed = VocabEmbedding(embed, communicator)
        self._cos_sin = rotary_table(arch.rope, max_model_len, embed.device)
        self._layers = [LlamaLayer(ops, arch, reader, i) for i in range(arch.num_layers)]
        self._norm = reader.read("model.norm.weight")
        head = embed if arch.tie_word_embeddings else reader.read(LM_HEAD)
        self._head = LmHead(ops, head, arch.vocab_size, communicator)

    def forward(self, token_ids: Tensor, positions: Tensor, rows: Tensor | None) -> Computation:
        del positions  # whoever answers the layers' calls has them
        x = yield self._embed(token_ids)
        residual: Tensor | None = None
        last = len(self._layers) - 1
        for i, layer in enumerate(self._layers):
            # After the last layer's store only rows with logits matter.
            x, residual = yield from layer(x, residual, self._cos_sin, rows if i == last else None)
        normed, _ = self._ops.rms_norm(x, self._norm, self._eps, residual)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)

    def likeliest(self, hidden: Tensor) -> Tensor:
        return self._head.likeliest(hidden)
