"""The text of prompts: made of stretches, equal where their keys are equal, so that prefixes are shared.

How many tokens a word is differs from model to model. With a tokenizer at hand only words of one token are
used; else the target is asked once what two short prompts cost (`Scale`), and lengths are right in the mean.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ellm.worker.api.errors import ConfigError

# Short common words: one token each in most vocabularies of natural language.
_COMMON = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not "
    "but what all were when we there can an your which their said if do will each about how up out them "
    "then she many some so these would other into has more her two like him see time could no make than "
    "first been its who now people my made over did down only way find use may water long little very "
    "after words called just where most know get through back much go good new write our me man too any "
    "day same right look think also around another came come work three must because does part even place "
    "well such here take why help put different away again off went old number great tell men say small "
    "every found still between name should home big give air line set own under read last never us left "
    "end along while might next sound below saw something thought both few those always show large often "
    "together asked house world going want school important until form food keep children feet land side "
    "without boy once animal life enough took four head above kind began almost live page got earth need "
    "far hand high year mother light country father let night picture being study second soon story since "
    "white ever paper hard near sentence better best across during today however sure knew try told young "
    "sun thing whole hear example heard "
)
WORDS = tuple(_COMMON.split())
FIRST_ID, LAST_ID = 16, 1_000  # of prompts made of token ids: above the special ones, in every vocabulary


@dataclass(frozen=True, slots=True)
class Stretch:
    """`tokens` tokens whose content follows from `key` alone."""

    key: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one turn says: `text` where a dataset has it, else stretches. The first `num_system` stretches are
    the system message of a chat."""

    tokens: int
    stretches: tuple[Stretch, ...] = ()
    num_system: int = 0
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Scale:
    """Tokens of a prompt = overhead + tokens_per_word * words."""

    tokens_per_word: float = 1.0
    overhead: float = 0.0

    @staticmethod
    def fitted(words: Sequence[int], tokens: Sequence[int]) -> Scale:
        """Through two points; what is no line upwards is taken as one token a word."""
        slope = (tokens[1] - tokens[0]) / (words[1] - words[0])
        if slope <= 0.0:
            return Scale()
        return Scale(slope, max(0.0, tokens[0] - slope * words[0]))


class PromptWriter:
    """Writes prompts as text or token ids; the same prompt is the same text in every process."""

    def __init__(self, scale: Scale, words: Sequence[str] = WORDS) -> None:
        self._scale = scale
        self._words = words
        # Stretches that many prompts begin with are written once.
        self._stretch = lru_cache(maxsize=4096)(self._write)

    def parts(self, prompt: Prompt) -> tuple[str, str]:
        """(system text, user text)."""
        if prompt.text is not None:
            return "", prompt.text
        texts = [self._stretch(stretch.key, self._num_words(stretch.tokens)) for stretch in prompt.stretches]
        if texts and self._scale.overhead:
            last = prompt.stretches[-1]
            fewer = max(1, self._num_words(last.tokens - self._scale.overhead))
            texts[-1] = self._write(last.key, fewer)
        return "".join(texts[: prompt.num_system]), "".join(texts[prompt.num_system :])

    def text(self, prompt: Prompt) -> str:
        return "".join(self.parts(prompt))

    @staticmethod
    def ids(prompt: Prompt) -> list[int]:
        """Exactly `tokens` of them."""
        return [
            id_
            for stretch in prompt.stretches
            for id_ in random.Random(stretch.key).choices(range(FIRST_ID, LAST_ID), k=stretch.tokens)
        ]

    def _num_words(self, tokens: float) -> int:
        return max(1, round(tokens / self._scale.tokens_per_word))

    def _write(self, key: str, count: int) -> str:
        return "".join(f" {word}" for word in random.Random(key).choices(self._words, k=count))


def single_token_words(folder: str) -> tuple[list[str], int]:
    """Words that are one token with a space before them, and the tokens that begin every text, by the
    tokenizer in `folder`. Raises ConfigError."""
    from tokenizers import Tokenizer

    path = Path(folder)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"--tokenizer: cannot read {path}: {error}") from None
    words = [word for word in WORDS if len(tokenizer.encode(f" {word}", add_special_tokens=False).ids) == 1]
    if len(words) < 16:
        raise ConfigError(f"--tokenizer {folder}: too few common words are one token; leave it out")
    return words, len(tokenizer.encode("", add_special_tokens=True).ids)
