"""Tiny random checkpoints in the Hugging Face layout, written by transformers itself.

Weights are drawn larger than a fresh model's, so that outputs are far from ties and depend on the context.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB_SIZE = 320
EOS_TOKEN_ID = 257
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "

_DECODER = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": EOS_TOKEN_ID,
    "tie_word_embeddings": False,
}
_OPT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "word_embed_proj_dim": 48,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": 258,
    "dropout": 0.0,
}


def _config(family: str, overrides: dict[str, Any]) -> transformers.PretrainedConfig:
    classes = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "opt": transformers.OPTConfig,
    }
    return classes[family](**((_OPT if family == "opt" else _DECODER) | overrides))


def build_model(family: str, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A random float32 model of `family`: llama, mistral, qwen2, qwen3 or opt."""
    model = transformers.AutoModelForCausalLM.from_config(_config(family, overrides), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1.0 + 0.2 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.2 * noise)
            else:
                # Rows of length about 1.5 keep activations of order 1 through all layers.
                scale = 0.5 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5
                parameter.copy_(scale * noise)
    model.eval()
    return model


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: token id = byte, then <s>, </s>, <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "50GB",
    **overrides: Any,
) -> transformers.PreTrainedModel:
    """Write a random checkpoint with a tokenizer to `folder`; returns the model that was written."""
    model = build_model(family, seed, **overrides).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    return model
