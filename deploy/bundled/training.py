"""One training run: the weights, the optimizer and the place in the token stream, step by step.

Knows neither files' layout nor the command line; a checkpoint is all that it reads and writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from ellm.deploy.bundled.packing import TokenStream, rows
from ellm.deploy.bundled.recipe import Recipe, model_config
from ellm.deploy.bundled.tokenizer import VOCAB_SIZE

EAGER_ROW_TOKENS = 256  # up to here the plain attention is the faster one on CPU


class Replica:
    """A model and one thread's share of a step; the weights may be another replica's, the gradients never."""

    def __init__(self, config: LlamaConfig, dropout: float) -> None:
        self.model = LlamaForCausalLM(config)
        self._generator = torch.Generator()
        for name, module in self.model.named_modules():
            if dropout and name.endswith(("embed_tokens", "o_proj", "down_proj")):
                module.register_forward_hook(self._drop(dropout))

    def _drop(self, probability: float) -> Callable[[torch.nn.Module, object, torch.Tensor], torch.Tensor]:
        """Dropout of a feature along a whole row, on embeddings and on what a block adds to the residual."""

        def hook(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
            if not module.training:
                return output
            num_rows, _, hidden_size = output.shape
            kept = torch.empty(num_rows, 1, hidden_size, dtype=output.dtype)
            return output * kept.bernoulli_(1 - probability, generator=self._generator).div_(1 - probability)

        return hook

    def share_weights(self, other: Replica) -> None:
        """Use the other's weights from now on."""
        for mine, theirs in zip(self.model.parameters(), other.model.parameters(), strict=True):
            mine.data = theirs.data

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy in nats; inputs and targets [num_rows, row_tokens]."""
        self.model.set_attn_implementation("eager" if inputs.shape[1] <= EAGER_ROW_TOKENS else "sdpa")
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(input_ids=inputs, use_cache=False).logits
        return functional.cross_entropy(logits.view(-1, VOCAB_SIZE).float(), targets.reshape(-1))

    def backward(self, tokens: list[int], row_tokens: int, seed: int) -> float:
        """Forward and backward of one micro-batch on one core; returns its loss."""
        torch.set_num_threads(1)
        self._generator.manual_seed(seed)
        self.model.train()
        self.model.zero_grad()
        loss = self.loss(*rows(tokens, row_tokens))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    @torch.no_grad()
    def summed_loss(self, pair: tuple[torch.Tensor, torch.Tensor]) -> float:
        """Cross entropy summed over the targets of (inputs, targets), without dropout."""
        torch.set_num_threads(1)
        self.model.eval()
        return self.loss(*pair).item() * pair[1].numel()


class Training:
    """The weights, their optimizer and their place in the stream.

    Micro-batches run side by side, one thread with one core each. They meet once per step, so a busy machine
    slows a run by the share it takes and no more, and no sum depends on the number of cores.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: Tokenizer, stream: TokenStream, held_out: list[int]
    ) -> None:
        torch.manual_seed(recipe.seed)
        torch.set_num_threads(1)
        self.recipe = recipe
        self._replicas = [
            Replica(model_config(tokenizer), recipe.dropout) for _ in range(recipe.num_micro_batches)
        ]
        for replica in self._replicas[1:]:
            replica.share_weights(self._replicas[0])
        self._threads = ThreadPoolExecutor(recipe.num_micro_batches)
        self.model = self._replicas[0].model
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.dim() == 1]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
        self.stream = stream
        self._held_out = held_out
        self.step = 0

    def train_step(self) -> float:
        """One optimizer step; returns its training loss."""
        recipe = self.recipe
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.learning_rate(self.step)
        batches = [self.stream.take(recipe.micro_batch_tokens) for _ in self._replicas]
        first_seed = (recipe.seed * 1_000_003 + self.step) * len(batches)
        seeds = range(first_seed, first_seed + len(batches))
        lengths = [recipe.row_tokens(self.step)] * len(batches)
        losses = list(self._threads.map(Replica.backward, self._replicas, batches, lengths, seeds))
        for parameters in zip(*(replica.model.parameters() for replica in self._replicas), strict=True):
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            parameters[0].grad = torch.stack(gradients).mean(0)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.max_gradient_norm)
        self._optimizer.step()
        self.step += 1
        return sum(losses) / len(losses)

    def held_out_loss(self, row_tokens: int = 512) -> float:
        """Mean cross entropy per held-out token, in nats."""
        inputs, targets = rows(self._held_out, row_tokens)
        pairs = [(inputs[at : at + 4], targets[at : at + 4]) for at in range(0, len(inputs), 4)]
        total = 0.0
        for first in range(0, len(pairs), len(self._replicas)):
            total += sum(self._threads.map(Replica.summed_loss, self._replicas, pairs[first:]))
        return total / targets.numel()

    def save(self, path: Path) -> None:
        """Write a checkpoint; a reader sees the old one or the new one, never half."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
        }
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def load(self, path: Path) -> None:
        """Take up a checkpoint of the same recipe and move the stream to its place."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        for _ in range(state["step"] * self.recipe.num_micro_batches):
            self.stream.take(self.recipe.micro_batch_tokens)
        self.step = state["step"]
