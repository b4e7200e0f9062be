"""Writes the shipped model as a Hugging Face folder, with training.json beside it."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaForCausalLM

from ellm.deploy.bundled.recipe import model_config
from ellm.deploy.bundled.tokenizer import BOS, EOS, EOT, PAD, save_tokenizer
from ellm.deploy.bundled.training import Training


def write_folder(folder: Path, training: Training, tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
    """The Hugging Face folder, weights in bf16, and training.json beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(tokenizer)
    model = LlamaForCausalLM(config)
    model.load_state_dict(training.model.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=[tokenizer.token_to_id(EOS), tokenizer.token_to_id(EOT)],
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, folder)
    recipe = training.recipe
    record = {
        "num_parameters": model.num_parameters(),
        "num_steps": training.step,
        "num_tokens": training.step * recipe.num_micro_batches * recipe.micro_batch_tokens,
        "num_epochs": training.stream.num_epochs_begun,
        **facts,
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "recipe": asdict(recipe),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
