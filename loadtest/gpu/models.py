"""Checkpoints with random weights in the shapes of known models, and what their steps must read and compute.

Written once, in bfloat16, as Hugging Face lays them out; other engines read the same folder.

    python -m ellm.loadtest.gpu.models --models FOLDER qwen3-0.6b llama-3-8b
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ellm.worker.model.architecture import Architecture
from ellm.worker.model.inspect import read_architecture
from ellm.worker.model.weights import EMBED, LM_HEAD, expected_shapes

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu"}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "tiny": {
        **_LLAMA,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "least": {  # for kernels that are interpreted
        **_LLAMA,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 64,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
}
_SHARD_BYTES = 2 << 30
_STD = 0.02
_SHARPER = 5.0  # at the usual scale logits are nearly equal, and every rounding flips the largest


def make_model(name: str, folder: Path, device: str = "cpu", seed: int = 0) -> Path:
    """The folder `folder`/`name`, written unless it is there. `device`: where the numbers are drawn."""
    target = folder / name
    mark = target / "complete.json"
    if mark.exists() and json.loads(mark.read_text()) == {"seed": seed}:
        return target
    target.mkdir(parents=True, exist_ok=True)
    config = {**SHAPES[name], "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}
    (target / "config.json").write_text(json.dumps(config, indent=1))
    generator = torch.Generator(device).manual_seed(seed)
    arch, shard, size = read_architecture(target), dict[str, Tensor](), 0
    where: dict[str, str] = {}
    count = 1
    for key, shape in expected_shapes(arch).items():
        value = _draw(key, shape, arch, generator)
        if shard and size + value.nbytes > _SHARD_BYTES:
            save_file(shard, target / _file(count), metadata={"format": "pt"})
            shard, size, count = {}, 0, count + 1
        shard[key] = value
        size += value.nbytes
        where[key] = _file(count)
    save_file(shard, target / _file(count), metadata={"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    mark.write_text(json.dumps({"seed": seed}))
    return target


def _file(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def _draw(key: str, shape: tuple[int, ...], arch: Architecture, generator: torch.Generator) -> Tensor:
    """On the CPU, bfloat16. Norms are ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    head = EMBED if arch.tie_word_embeddings else LM_HEAD
    scale = _STD * (_SHARPER if key == head else 1.0)
    drawn = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return drawn.normal_(0.0, scale, generator=generator).cpu()


@dataclass(frozen=True, slots=True)
class Work:
    """What a model's step cannot do without, in bfloat16."""

    arch: Architecture

    @property
    def matrix_elements(self) -> int:
        """Of all matrices that every row meets; the LM head, not the table of embeddings."""
        shapes = expected_shapes(self.arch)
        skipped = set() if self.arch.tie_word_embeddings else {EMBED}
        return sum(math.prod(s) for key, s in shapes.items() if len(s) == 2 and key not in skipped)

    @property
    def kv_token_bytes(self) -> int:
        return 2 * self.arch.kv_elements_per_token

    def decode_bytes(self, batch: int, context: float) -> float:
        """Read by one step of `batch` rows after `context` tokens each: all matrices and all KV."""
        return 2 * self.matrix_elements + batch * context * self.kv_token_bytes

    def decode_flops(self, batch: int, context: float) -> float:
        return batch * (2.0 * self.matrix_elements + 2.0 * context * self._pair_flops)

    def prefill_flops(self, batch: int, tokens: int) -> float:
        """Of `batch` prompts; their last rows alone meet the LM head, half of the square is masked."""
        head = self.arch.vocab_size * self.arch.embed_dim
        rows = 2.0 * tokens * (self.matrix_elements - head) + 2.0 * head
        return batch * (rows + tokens * tokens * self._pair_flops)

    @property
    def _pair_flops(self) -> float:
        """Of one query and one key over all layers and heads, for scores; as many again for values."""
        arch = self.arch
        return 2.0 * arch.num_layers * arch.num_heads * arch.head_dim


def work_of(folder: Path) -> Work:
    return Work(read_architecture(folder))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", nargs="+", choices=list(SHAPES))
    parser.add_argument("--models", type=Path, default=Path(".cache/gpu-models"))
    parser.add_argument("--device", default="cuda", help="where the numbers are drawn")
    args = parser.parse_args(argv)
    for name in args.name:
        print(make_model(name, args.models, args.device), flush=True)


if __name__ == "__main__":
    main()
