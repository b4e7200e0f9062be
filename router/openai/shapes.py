"""How one kind of request's choices look: completions carry text, chats carry messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ellm.router.openai.logprobs import chat_logprobs, completion_logprobs
from ellm.router.sequence import ScoredToken
from ellm.router.tokenizer import Tokenizer


class Shape(Protocol):
    """How one kind of request's choices look."""

    prefix: str  # of the id
    object: str
    chunk_object: str

    def delta(self, text: str, logprobs: Any) -> dict[str, Any]:
        """The part of a chunk's choice that carries new text."""
        ...

    def choice(self, text: str, logprobs: Any) -> dict[str, Any]:
        """The part of a whole answer's choice that carries the text."""
        ...

    def opening(self) -> dict[str, Any] | None:
        """What a stream says first of each choice."""
        ...

    def logprobs(self, scored: Sequence[ScoredToken], tokenizer: Tokenizer, base_offset: int) -> Any: ...


class CompletionShape:
    prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def delta(self, text: str, logprobs: Any) -> dict[str, Any]:
        return {"text": text, "logprobs": logprobs}

    def choice(self, text: str, logprobs: Any) -> dict[str, Any]:
        return {"text": text, "logprobs": logprobs}

    def opening(self) -> dict[str, Any] | None:
        return None

    def logprobs(self, scored: Sequence[ScoredToken], tokenizer: Tokenizer, base_offset: int) -> Any:
        return completion_logprobs(scored, tokenizer, base_offset)


class ChatShape:
    prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def delta(self, text: str, logprobs: Any) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}, "logprobs": logprobs}

    def choice(self, text: str, logprobs: Any) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": logprobs}

    def opening(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def logprobs(self, scored: Sequence[ScoredToken], tokenizer: Tokenizer, base_offset: int) -> Any:
        return chat_logprobs(scored, tokenizer)
