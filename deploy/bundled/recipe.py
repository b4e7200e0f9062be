"""What decides the shipped model's weights, the corpus apart: its shape, the steps, the rates, the seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tokenizers import Tokenizer
from transformers import LlamaConfig

from ellm.deploy.bundled.tokenizer import BOS, EOS, MAX_POSITIONS, PAD, VOCAB_SIZE


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of steps on rows of one length."""

    num_steps: int
    row_tokens: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """Numbers of one training run; rows grow from phase to phase, as short rows cost the least per token."""

    phases: tuple[Phase, ...] = (Phase(2300, 128), Phase(500, 512), Phase(200, 2048))
    micro_batch_tokens: int = 2048
    num_micro_batches: int = 2
    peak_learning_rate: float = 3e-3
    final_learning_rate: float = 5e-5
    num_warmup_steps: int = 100
    weight_decay: float = 0.1
    dropout: float = 0.1
    max_gradient_norm: float = 1.0
    seed: int = 20

    @property
    def num_steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.num_steps for phase in self.phases)

    def row_tokens(self, step: int) -> int:
        """Row length of a step, counted from 0."""
        for phase in self.phases:
            if step < phase.num_steps:
                return phase.row_tokens
            step -= phase.num_steps
        raise AssertionError("step beyond the last phase")

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to the final rate."""
        if step < self.num_warmup_steps:
            return self.peak_learning_rate * (step + 1) / self.num_warmup_steps
        done = (step - self.num_warmup_steps) / max(1, self.num_steps - self.num_warmup_steps)
        span = self.peak_learning_rate - self.final_learning_rate
        return self.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * done))


def model_config(tokenizer: Tokenizer) -> LlamaConfig:
    """The shape: 5.6 million parameters, 11 MB in bf16."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
