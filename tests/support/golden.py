"""Executors on tiny checkpoints, and what transformers says of the same checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ellm.worker.api.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from ellm.worker.executor.local import LocalExecutor

BLOCK_SIZE = 16
Checkpoint = tuple[Path, transformers.PreTrainedModel]

# Odd shapes on purpose: 6 query heads on 2 key/value heads, a head dimension that is not hidden / heads,
# windows shorter than the sequences, positions beyond the original context, several files of bfloat16.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-wide-heads": ("llama", {"head_dim": 20, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6}),
    "llama3-rope": (
        "llama",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "mistral-shards": (
        "mistral",
        {"sliding_window": None, "head_dim": 24, "max_shard_size": "40KB", "dtype": torch.bfloat16},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-window": (
        "qwen3",
        {
            "head_dim": 32,
            "use_sliding_window": True,
            "sliding_window": 33,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "opt": ("opt", {}),
    "opt-post-norm": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "opt-untied": ("opt", {"tie_word_embeddings": False, "enable_bias": False}),
}

# For four ranks: key/value heads that two ranks share, a vocabulary that four do not divide.
RANK_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-8-heads": ("llama", {"num_attention_heads": 8, "head_dim": 12, "vocab_size": 319}),
    "qwen2-8-heads": (
        "qwen2",
        {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True, "vocab_size": 318},
    ),
    "opt-8-heads": ("opt", {"num_attention_heads": 8, "word_embed_proj_dim": 32}),
}


def executor(folder: Path, **settings: Any) -> LocalExecutor:
    """A small executor on `folder`, on one thread; see `config`."""
    return LocalExecutor.load(config(folder, **settings))


def config(
    folder: Path,
    *,
    jit: bool | None,
    deterministic: bool | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    num_blocks: int = 128,
    transient_blocks: int = 0,
    host_bytes: int = 0,
    **worker: Any,
) -> WorkerConfig:
    """Of a small executor on `folder`, on one thread; `worker`: fields of WorkerConfig."""
    return WorkerConfig(
        model=ModelConfig(
            path=str(folder),
            dtype=dtype,  # type: ignore[arg-type]
            device=device,  # type: ignore[arg-type]
            jit=jit,
            deterministic=deterministic,
        ),
        cache=CacheConfig(
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            transient_blocks=transient_blocks,
            host_bytes=host_bytes,
            host_tier="copied",
        ),
        scheduler=SchedulerConfig(max_num_seqs=8, max_step_tokens=192),
        num_threads=1,
        **worker,
    )


def prompt(length: int, seed: int, vocab_size: int = 256) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
    return ids


def greedy(model: transformers.PreTrainedModel, ids: Sequence[int], num_tokens: int) -> list[int]:
    """transformers' own greedy continuation, which no end-of-text stops."""
    config = transformers.GenerationConfig(max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    # Else `generate` fills unset fields from the model's own.
    saved, model.generation_config = model.generation_config, config
    out = model.generate(torch.tensor([list(ids)]), generation_config=config)
    model.generation_config = saved
    tokens: list[int] = out[0, len(ids) :].tolist()
    assert len(tokens) == num_tokens
    return tokens


def log_softmax(model: transformers.PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """[len(ids), V] float32: log-probabilities of the token after each position."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(ids)])).logits[0]
    return logits.float().log_softmax(-1)
