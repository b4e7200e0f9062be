"""Trains the model that ships and writes its folder.

    python -m ellm.deploy.bundled.train --checkpoints /tmp/pydoc-5m

A run is a fixed number of steps over a stream that depends on the seed only; an interrupted one goes on with
--resume.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ellm.deploy.bundled.corpus import all_documents, split
from ellm.deploy.bundled.folder import write_folder
from ellm.deploy.bundled.packing import TokenStream, held_out_tokens, render
from ellm.deploy.bundled.recipe import Recipe
from ellm.deploy.bundled.tokenizer import train_tokenizer
from ellm.deploy.bundled.training import Training


def progress(training: Training, every: int) -> Iterator[int]:
    """Run the steps that are left, printing loss, speed and time left; yields the step after each `every`."""
    recipe, total, begun, first = training.recipe, 0.0, time.monotonic(), training.step
    step_tokens = recipe.num_micro_batches * recipe.micro_batch_tokens
    while training.step < recipe.num_steps:
        total += training.train_step()
        if training.step % every == 0 or training.step == recipe.num_steps:
            num = (training.step - first - 1) % every + 1
            step_s = (time.monotonic() - begun) / (training.step - first)
            print(
                f"step {training.step}/{recipe.num_steps} rows {recipe.row_tokens(training.step - 1)}"
                f" epoch {training.stream.num_epochs_begun} loss {total / num:.4f}"
                f" {step_tokens / step_s:.0f} tok/s"
                f" ETA {(recipe.num_steps - training.step) * step_s / 60:.1f} min",
                flush=True,
            )
            total = 0.0
            yield training.step


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the model that ships.")
    folder = Path(__file__).parent / "pydoc-5m"
    parser.add_argument("--out", type=Path, default=folder, help="model folder to write")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint there")
    parser.add_argument("--every", type=int, default=50, help="steps between progress lines")
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    arguments = parser.parse_args()
    arguments.checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.checkpoints / "checkpoint.pt"

    documents, held_out_documents = split(all_documents())
    tokenizer = train_tokenizer(render(document, titled=True) for document in documents)
    held_out = held_out_tokens(held_out_documents, tokenizer)
    recipe = Recipe()
    training = Training(recipe, tokenizer, TokenStream(documents, tokenizer, recipe.seed), held_out)
    if arguments.resume:
        training.load(checkpoint)
    facts: dict[str, Any] = {
        "num_training_documents": len(documents),
        "num_held_out_documents": len(held_out_documents),
        "num_held_out_tokens": len(held_out),
        "held_out_bytes": sum(len(render(d, titled=True).encode()) for d in held_out_documents),
    }
    print(facts, flush=True)
    for step in progress(training, arguments.every):
        if step % arguments.save_every == 0 or step == recipe.num_steps:
            facts["held_out_loss"] = round(training.held_out_loss(), 4)
            print(f"step {step} held-out loss {facts['held_out_loss']:.4f}", flush=True)
            training.save(checkpoint)
            write_folder(arguments.out, training, tokenizer, facts)


if __name__ == "__main__":
    main()
