"""What goes back: OpenAI's objects, whole or as chunks of a stream.

A chunk that carries text alone is made from a template: bytes before, the text as JSON, bytes after. All else
(first and last chunk, logprobs, token ids) is rare and built as a dict. One `Answer` serves one request; its
`Shape` says how a choice looks. Where a chat has tools or thinks aloud, a parser per choice takes its text
apart.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from ellm.router.openai.chat_parser import ChatParser
from ellm.router.openai.job import Job
from ellm.router.openai.logprobs import scored_prompt
from ellm.router.openai.shapes import Shape
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
        parsing, count = job.parsing, job.num_sequences
        self._parsers = [] if parsing is None else [ChatParser(parsing) for _ in range(count)]
        self.parses = bool(self._parsers)  # wants every token, also one without a text
        # Text alone goes by template unless something comes with every token.
        alone = not (job.return_token_ids or job.continuous_usage or self._logprobs)
        self.templated = alone and not self._parsers
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

    def take(self, index: int, text: str, token_ids: Sequence[int]) -> None:
        """Text of an answer that is not streamed, as it comes."""
        if self._parsers:
            self._parsers[index].feed(text, map(self._tokenizer.token_bytes, token_ids))

    def chunk(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int],
        scored: Sequence[ScoredToken],
        finish_reason: FinishReason | None,
        usage: Usage | None,
    ) -> bytes:
        """Any chunk of one choice; several, or none, where it is parsed."""
        logprobs = None
        if scored:
            offset = len(self._echo_of(index)) if self._job.echo else 0
            logprobs = self._shape.logprobs(scored, self._tokenizer, offset)
        ids = {"token_ids": list(token_ids)} if self._job.return_token_ids else {}
        if self._parsers:
            return self._parsed(index, text, token_ids, ids | {"logprobs": logprobs}, finish_reason, usage)
        delta = self._shape.delta(text, logprobs) | ids
        return event(self._chunk(index, delta, finish_reason, usage))

    def _parsed(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int],
        first: dict[str, Any],
        reason: str | None,
        usage: Usage | None,
    ) -> bytes:
        """A chunk for each part of the message; `first` goes with the first, the reason with the last."""
        parser = self._parsers[index]
        deltas = parser.feed(text, map(self._tokenizer.token_bytes, token_ids))
        if reason is not None:
            deltas += parser.finish()
            reason = _reason(parser, reason)
        if not deltas and (reason is not None or any(first.values())):
            deltas.append({})
        chunks = []
        for i, delta in enumerate(deltas):
            choice = {"delta": delta, "logprobs": None} | (first if i == 0 else {})
            last = i == len(deltas) - 1
            chunks.append(event(self._chunk(index, choice, reason if last else None, usage)))
        return b"".join(chunks)

    def usage_chunk(self, usage: Usage) -> bytes:
        """The last chunk, without choices."""
        return event(
            {**self._head, "object": self._shape.chunk_object, "choices": [], "usage": self._usage(usage)}
        )

    def whole(self, sequences: Sequence[LiveSequence], choices: Sequence[ChoiceText], usage: Usage) -> bytes:
        """The answer that is not streamed."""
        made = [
            self._whole_choice(sequence, choice) for sequence, choice in zip(sequences, choices, strict=True)
        ]
        body = {**self._head, "object": self._shape.object, "choices": made, "usage": self._usage(usage)}
        return orjson.dumps(body)

    def _whole_choice(self, sequence: LiveSequence, choice: ChoiceText) -> dict[str, Any]:
        echo = self._echo_of(sequence.index) if self._job.echo else ""
        logprobs = None
        if self._logprobs:
            scored = self._scored_prompt(sequence)
            # Two parts of one list: offsets of the second begin behind the echo.
            moved = [ScoredToken(s.token_id, s.offset + len(echo), s.logprobs) for s in choice.scored]
            logprobs = self._shape.logprobs([*scored, *moved], self._tokenizer, 0)
        said = self._shape.choice(echo + choice.text, logprobs)
        reason: str | None = choice.finish_reason
        if self._parsers:
            parser = self._parsers[sequence.index]
            parser.finish()
            said, reason = {"message": parser.message(), "logprobs": logprobs}, _reason(parser, reason)
        made = {"index": sequence.index, **said, "finish_reason": reason}
        if self._job.return_token_ids:
            made["token_ids"] = list(choice.token_ids)
            made["prompt_token_ids"] = list(sequence.prompt_ids)
        return made

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None, usage: Usage | None
    ) -> dict[str, Any]:
        choice = {"index": index, **delta, "finish_reason": reason}
        chunk = {**self._head, "object": self._shape.chunk_object, "choices": [choice]}
        if usage is not None:
            chunk["usage"] = self._usage(usage)
        elif self._job.include_usage:
            chunk["usage"] = None
        return chunk

    def _usage(self, usage: Usage) -> dict[str, Any]:
        body = usage.body()
        if self._job.parsing is not None and self._job.parsing.reasoning:
            thought = sum(parser.reasoning_tokens for parser in self._parsers)
            body["completion_tokens_details"] = {"reasoning_tokens": thought}
        return body

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


def _reason(parser: ChatParser, reason: str | None) -> str | None:
    return "tool_calls" if parser.called and reason == "stop" else reason
