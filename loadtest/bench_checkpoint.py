"""The random-weight Llama of the engine benchmarks, the same file for every side.

28M parameters: on a small machine a step is then neither all overhead nor all matmul.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1536,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}

TOKENIZER = Path(__file__).parent.parent / "deploy" / "bundled" / "pydoc-5m"  # has as many tokens


def with_tokenizer(folder: Path) -> Path:
    """Give the checkpoint the bundled model's tokenizer, as servers need one; returns its folder."""
    shutil.copy(TOKENIZER / "tokenizer.json", folder / "tokenizer.json")
    about = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
    about.pop("backend", None)
    about["tokenizer_class"] = "PreTrainedTokenizerFast"  # which every version of transformers knows
    (folder / "tokenizer_config.json").write_text(json.dumps(about) + "\n")
    return folder


def make_checkpoint(folder: Path, seed: int = 0, shape: Mapping[str, object] = SHAPE) -> Path:
    """Write the checkpoint (float32) unless it is there; returns its folder."""
    mark = folder / "shape.json"
    if mark.exists() and json.loads(mark.read_text()) == {**shape, "seed": seed}:
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = LlamaForCausalLM(config).to(torch.float32)
    with torch.no_grad():
        # The default initial scale gives nearly equal logits, and then every rounding flips the argmax.
        model.lm_head.weight.mul_(5.0)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    mark.write_text(json.dumps({**shape, "seed": seed}))
    return folder
