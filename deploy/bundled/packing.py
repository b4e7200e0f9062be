"""Packs texts into rows of tokens: an endless training stream in a fixed order, and the held-out rows."""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer

from ellm.deploy.bundled.chat import conversations
from ellm.deploy.bundled.corpus import Document
from ellm.deploy.bundled.tokenizer import BOS, EOS, render_chat

MAX_SIGNATURE_CHARS = 200


def render(document: Document, *, titled: bool) -> str:
    """One document between <|bos|> and <|eos|>, with its name and signature above it where `titled`."""
    title = ""
    if titled and document.kind not in ("topic", "comment"):
        title = f"{document.name}{document.signature[:MAX_SIGNATURE_CHARS]}\n\n"
    return f"{BOS}{title}{document.text}{EOS}"


class TokenStream:
    """Training tokens, epoch after epoch; the order depends on the seed and on nothing else."""

    def __init__(self, documents: list[Document], tokenizer: Tokenizer, seed: int) -> None:
        self._documents = documents
        self._tokenizer = tokenizer
        self._seed = seed
        self._buffer: list[int] = []
        self.num_epochs_begun = 0

    def take(self, num_tokens: int) -> list[int]:
        """The next tokens and the one after them (the last target); moves on by `num_tokens`."""
        while len(self._buffer) <= num_tokens:
            self._buffer.extend(self._epoch(self.num_epochs_begun))
            self.num_epochs_begun += 1
        taken = self._buffer[: num_tokens + 1]
        del self._buffer[:num_tokens]
        return taken

    def _epoch(self, index: int) -> list[int]:
        """Each document once as text and once as a question with its answer, shuffled and phrased anew."""
        rng = random.Random(f"{self._seed}:{index}")
        texts = [render(document, titled=rng.random() < 0.6) for document in self._documents]
        texts.extend(render_chat(turns) for turns in conversations(self._documents, rng))
        rng.shuffle(texts)
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [token for encoding in encoded for token in encoding.ids]


def rows(tokens: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, both [(len(tokens) - 1) // length, length]; the last token is only a target."""
    whole = (len(tokens) - 1) // length * length
    stream = torch.tensor(tokens[: whole + 1], dtype=torch.long)
    return stream[:-1].view(-1, length), stream[1:].view(-1, length)


def held_out_tokens(documents: list[Document], tokenizer: Tokenizer) -> list[int]:
    """Held-out documents one after the other, titled, in the corpus's order."""
    encoded = tokenizer.encode_batch([render(d, titled=True) for d in documents], add_special_tokens=False)
    return [token for encoding in encoded for token in encoding.ids]
