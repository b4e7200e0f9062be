"""A checkpoint's tokenizer and chat template, read from its folder without torch or transformers.

Encodes, decodes, renders chats; long texts in a thread, so that the event loop stays free. Knows nothing of
requests.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

from ellm.router.detokenize import Detokenizer, DetokenizerFactory, decoder_json
from ellm.router.openai.chat_template import ChatTemplate
from ellm.worker.api.errors import ConfigError, InvalidRequest

INLINE_CHARS = 4096  # about a millisecond of work; a longer text is encoded in a thread
# Threads of their own: long texts must not hold up what else the router does in threads (finding workers).
TEXT_THREADS = ThreadPoolExecutor(2, thread_name_prefix="ellm-text")
P = ParamSpec("P")
T = TypeVar("T")


async def in_text_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`work` off the event loop; at most two at a time."""
    return await asyncio.get_running_loop().run_in_executor(TEXT_THREADS, partial(work, *args, **kwargs))


class Tokenizer:
    """Text to ids and back. Thread-safe: nothing of it changes after construction."""

    def __init__(self, fast: FastTokenizer, template: ChatTemplate | None = None) -> None:
        self._fast = fast
        self.template = template
        added = fast.get_added_tokens_decoder()
        special = frozenset(i for i, token in added.items() if token.special)
        size = fast.get_vocab_size(with_added_tokens=True)
        if added:
            size = max(size, max(added) + 1)
        self.vocab_size = size
        tokens = [fast.id_to_token(i) for i in range(size)]
        self._detokenizers = DetokenizerFactory(
            decoder_json(fast.decoder), tokens, special, self._decode_whole
        )
        self._tokens = tokens
        self.max_token_bytes = max(len(self.token_bytes(i)) for i in range(size))

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json (or vocab.json and merges.txt) and the chat template. Raises ConfigError."""
        config = _read_json(folder / "tokenizer_config.json")
        return cls(_load_fast(folder), ChatTemplate.load(folder, config))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) <= INLINE_CHARS:
            short: list[int] = self._fast.encode(text, add_special_tokens=add_special_tokens).ids
            return short
        # Unlike `encode`, this lets go of the interpreter, so that a thread of its own helps.
        (found,) = self._fast.encode_batch([text], add_special_tokens=add_special_tokens)
        return list(found.ids)

    async def encode_async(
        self, text: str, add_special_tokens: bool = True, *, of_chars: int = 0
    ) -> list[int]:
        """`encode`, off the event loop where the text, or what it is a part of (`of_chars`), is long."""
        if max(len(text), of_chars) <= INLINE_CHARS:
            return self.encode(text, add_special_tokens)
        return await in_text_thread(self.encode, text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return detokenizer.feed(token_ids) + detokenizer.flush()

    def detokenizer(self, *, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> Detokenizer:
        """The state of one sequence whose prompt is `after`."""
        return self._detokenizers.make(skip_special=skip_special_tokens, after=after)

    def token_bytes(self, token_id: int) -> bytes:
        return self._detokenizers.token_bytes(token_id)

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it."""
        return self._tokens[token_id] if token_id < len(self._tokens) else None

    def definition(self) -> str:
        """All of it as the text of a tokenizer.json."""
        return str(self._fast.to_str())

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt of a conversation. Raises InvalidRequest."""
        if self.template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        return self.template.render(messages, **options)

    def _decode_whole(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(self._fast.decode(list(token_ids), skip_special_tokens=skip_special_tokens))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return loaded


def _load_fast(folder: Path) -> FastTokenizer:
    path = folder / "tokenizer.json"
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    try:
        if path.is_file():
            return FastTokenizer.from_file(str(path))
        if vocab.is_file() and merges.is_file():
            return _from_merges(folder, vocab, merges)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ConfigError(f"the tokenizer in {folder} cannot be read: {error}") from None
    raise ConfigError(
        f"{folder} has no tokenizer.json; write one with "
        f"AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    )


def _from_merges(folder: Path, vocab: Path, merges: Path) -> FastTokenizer:
    """GPT-2's files, as OPT ships them: byte-level BPE, the BOS token in front where the config says so."""
    fast = FastTokenizer(models.BPE.from_file(str(vocab), str(merges)))
    config = _read_json(folder / "tokenizer_config.json")
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    fast.decoder = decoders.ByteLevel()
    names = _read_json(folder / "special_tokens_map.json")
    special = {_content(names.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    fast.add_special_tokens(sorted(token for token in special if token is not None))
    bos = _content(names.get("bos_token"))
    if config.get("add_bos_token") and bos is not None:
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, fast.token_to_id(bos))]
        )
    return fast


def _content(token: Any) -> str | None:
    """A special token is written as a string, or as an object with its content."""
    return token.get("content") if isinstance(token, dict) else token
