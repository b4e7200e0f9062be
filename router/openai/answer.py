"""What goes back: OpenAI's objects, whole or as chunks of a stream.

A chunk that carries text alone is made from a template: bytes before, the text as JSON, bytes after. All else
(first and last chunk, logprobs, token ids) is rare and built as a dict. One `Answer` serves one request; its
`Shape` says how a choice looks.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from ellm.router.openai.convert import Job
from ellm.router.openai.logprobs import chat_logprobs, completion_logprobs, scored_prompt
from ellm.router.sequence import ScoredToken
from ellm.router.sequence import Sequence as LiveSequence
from ellm.router.tokenizer import Tokenizer
from ellm.worker.api.errors import EllmError
from ellm.worker.api.output import FinishReason

DONE = b"data: [DONE]\n\n"
_MARK = "\x00text\x00"
_MARKED = orjson.dumps(_MARK)


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


def error_body(error: EllmError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {
        "error": {
            "message": error.message, "type": error.kind, "param": error.param, "code": error.code,
        }
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Usage:
    """Counted once per prompt and once per generated token, whatever moved in between."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(slots=True)
class ChoiceText:
    """All that one sequence has brought, for an answer that is not streamed."""

    text: str
    token_ids: Sequence[int]
    scored: Sequence[ScoredToken]
    finish_reason: FinishReason | None


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


class Answer:
    """Writes one request's answer. Its id, time and model stay the same in all chunks."""

    def __init__(self, shape: Shape, job: Job, tokenizer: Tokenizer, model: str, fingerprint: str) -> None:
        self.id = shape.prefix + uuid.uuid4().hex
        self._shape = shape
        self._job = job
        self._tokenizer = tokenizer
        self._head = {
            "id": self.id,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._logprobs = bool(job.sampling) and job.sampling[0].logprobs is not None
        # Text alone goes by template unless something comes with every token.
        self.templated = not (job.return_token_ids or job.continuous_usage or self._logprobs)
        self._templates: list[tuple[bytes, bytes]] = []
        self._echoes = [self._echo(i) for i in range(len(job.prompts))] if job.echo else []

    def templates(self) -> list[tuple[bytes, bytes]]:
        """Of each choice, the bytes before and after the JSON of a text."""
        for index in range(len(self._templates), self._job.num_sequences):
            chunk = event(self._chunk(index, self._shape.delta(_MARK, None), None, None))
            before, after = chunk.split(_MARKED)
            self._templates.append((before, after))
        return self._templates

    def opening(self, sequence: LiveSequence) -> bytes:
        """What comes before a choice's first text: the role of a chat, the echo of a prompt."""
        ids = {"prompt_token_ids": list(sequence.prompt_ids)} if self._job.return_token_ids else {}
        if self._job.echo:
            scored = self._scored_prompt(sequence)
            logprobs = self._shape.logprobs(scored, self._tokenizer, 0) if scored else None
            delta = self._shape.delta(self._echo_of(sequence.index), logprobs) | ids
            return event(self._chunk(sequence.index, delta, None, None))
        first = self._shape.opening()
        if first is None and not ids:
            return b""
        return event(self._chunk(sequence.index, (first or self._shape.delta("", None)) | ids, None, None))

    def chunk(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int],
        scored: Sequence[ScoredToken],
        finish_reason: FinishReason | None,
        usage: Usage | None,
    ) -> bytes:
        """Any chunk of one choice."""
        logprobs = None
        if scored:
            offset = len(self._echo_of(index)) if self._job.echo else 0
            logprobs = self._shape.logprobs(scored, self._tokenizer, offset)
        delta = self._shape.delta(text, logprobs)
        if self._job.return_token_ids:
            delta["token_ids"] = list(token_ids)
        return event(self._chunk(index, delta, finish_reason, usage))

    def usage_chunk(self, usage: Usage) -> bytes:
        """The last chunk, without choices."""
        return event({**self._head, "object": self._shape.chunk_object, "choices": [], "usage": usage.body()})

    def whole(self, sequences: Sequence[LiveSequence], choices: Sequence[ChoiceText], usage: Usage) -> bytes:
        """The answer that is not streamed."""
        made = [
            self._whole_choice(sequence, choice) for sequence, choice in zip(sequences, choices, strict=True)
        ]
        body = {**self._head, "object": self._shape.object, "choices": made, "usage": usage.body()}
        return orjson.dumps(body)

    def _whole_choice(self, sequence: LiveSequence, choice: ChoiceText) -> dict[str, Any]:
        echo = self._echo_of(sequence.index) if self._job.echo else ""
        logprobs = None
        if self._logprobs:
            scored = self._scored_prompt(sequence)
            # Two parts of one list: offsets of the second begin behind the echo.
            moved = [ScoredToken(s.token_id, s.offset + len(echo), s.logprobs) for s in choice.scored]
            logprobs = self._shape.logprobs([*scored, *moved], self._tokenizer, 0)
        made = {
            "index": sequence.index,
            **self._shape.choice(echo + choice.text, logprobs),
            "finish_reason": choice.finish_reason,
        }
        if self._job.return_token_ids:
            made["token_ids"] = list(choice.token_ids)
            made["prompt_token_ids"] = list(sequence.prompt_ids)
        return made

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: FinishReason | None, usage: Usage | None
    ) -> dict[str, Any]:
        choice = {"index": index, **delta, "finish_reason": reason}
        chunk = {**self._head, "object": self._shape.chunk_object, "choices": [choice]}
        if usage is not None:
            chunk["usage"] = usage.body()
        elif self._job.include_usage:
            chunk["usage"] = None
        return chunk

    def _echo(self, prompt_index: int) -> str:
        prompt = self._job.prompts[prompt_index]
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.ids, self._job.skip_special_tokens)

    def _echo_of(self, index: int) -> str:
        return self._echoes[index // self._job.n]

    def _scored_prompt(self, sequence: LiveSequence) -> list[ScoredToken]:
        if not self._job.echo or sequence.prompt_logprobs is None:
            return []
        return scored_prompt(
            sequence.prompt_ids,
            sequence.prompt_logprobs,
            self._tokenizer,
            self._job.skip_special_tokens,
        )
