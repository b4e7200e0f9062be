"""One sequence on its way: which tokens have come, the text they make, and where it ends.

Takes each output exactly once, over any number of workers; detokenises, matches stop strings, and tells its
sink. Knows neither workers nor HTTP. This is the router's hot path: `accept` runs once per token.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from enum import Enum
from math import inf
from typing import Protocol

from ellm.router.detokenize import Detokenizer
from ellm.router.service_level import GRACE_TOKENS, NO_PROMISE, ServiceLevel
from ellm.router.stop_strings import StopMatcher
from ellm.worker.api import wire
from ellm.worker.api.errors import EllmError
from ellm.worker.api.output import FinishReason, SequenceOutput, TokenLogprobs
from ellm.worker.api.request import EngineRequest, SamplingParams

MAX_EVENTS = 64


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token with its log-probabilities, and where its text begins."""

    token_id: int
    offset: int  # characters of the sequence's text before it
    logprobs: TokenLogprobs | None  # None: the first token of a prompt


class Sink(Protocol):
    """Who is told. Calls come from the reader of a worker's stream and must not block."""

    def emit(
        self,
        sequence: Sequence,
        text: str,
        token_ids: Seq[int],
        scored: Seq[ScoredToken],
        finish_reason: FinishReason | None,
    ) -> None:
        """New text of a sequence, possibly none; the last call has the finish reason."""
        ...

    def fail(self, sequence: Sequence, error: EllmError) -> None:
        """The sequence has ended with an error."""
        ...


class Verdict(Enum):
    """What became of an output."""

    TAKEN = "taken"
    STALE = "stale"  # of an old attempt, or seen before
    GAP = "gap"  # something before it is missing: the sequence must move
    ENDED = "ended"  # the worker has finished it
    STOPPED = "stopped"  # the router has: the worker must be told
    REFUSED = "refused"  # the worker gives it back with an error


class Sequence:
    """State of one sequence; `finished` is final."""

    __slots__ = (
        "_include_stop",
        "_length",
        "_matcher",
        "_min_tokens",
        "_plain",
        "_scored",
        "_shown",
        "_tpot_slo_s",
        "arrived_at",
        "attempt",
        "avoid",
        "choice_index",
        "detokenizer",
        "error",
        "events",
        "finished",
        "first_token_at",
        "index",
        "kept",
        "late",
        "level",
        "num_cached_tokens",
        "num_deaths",
        "num_moves",
        "output_ids",
        "prompt_ids",
        "prompt_logprobs",
        "queue_time_s",
        "request_id",
        "retry_after_s",
        "room_in_s",
        "salt",
        "sampling",
        "session_id",
        "sink",
        "tenant",
        "token_at",
    )

    def __init__(
        self,
        request_id: str,
        index: int,
        prompt_ids: tuple[int, ...],
        sampling: SamplingParams,
        sink: Sink,
        detokenizer: Detokenizer,
    ) -> None:
        """`index` is the sequence's place among the request's choices."""
        self.request_id = request_id
        self.index = index
        self.choice_index = 0  # of the noise
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.sink = sink
        self.detokenizer = detokenizer
        self.salt = ""
        self.session_id: str | None = None  # of the client, for policies that keep sessions together
        self.tenant = ""  # stands for the API key
        self.attempt = 0
        self.num_deaths = 0  # workers that died with it
        self.num_moves = 0  # times it was moved, deaths included
        self.kept = False  # a worker had taken it: it is not refused any more for want of room
        self.avoid: set[str] = set()  # workers that have no room for it now
        self.room_in_s = inf  # the shortest time that one of them named
        self.retry_after_s: float | None = None  # of the last error
        self.output_ids: list[int] = []
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.num_cached_tokens = 0
        self.finished: FinishReason | None = None
        self.error: EllmError | tuple[str, str] | None = None
        self.events: list[tuple[float, str, str]] = []  # of its timeline: (when, what, detail)
        self.arrived_at = 0.0
        self.first_token_at = 0.0
        self.queue_time_s = 0.0  # in the worker that made the first token
        self.token_at = 0.0
        self.level = NO_PROMISE
        self.late = False  # a token came after its deadline
        self._tpot_slo_s = inf
        self._matcher: StopMatcher | None = None
        self._include_stop = False
        self._min_tokens = sampling.min_tokens
        self._plain = sampling.logprobs is None
        self._scored: list[ScoredToken] = []
        self._length = 0  # characters decoded
        self._shown = 0  # characters emitted

    def stop_at(self, matcher: StopMatcher | None, include: bool) -> None:
        """Set the stop strings; `include` keeps the stop in the text, that of a stop token too."""
        self._matcher = matcher
        self._include_stop = include
        self._plain = self._plain and matcher is None

    def serve_at(self, level: ServiceLevel) -> None:
        """Set what it was promised."""
        self.level = level
        self._tpot_slo_s = inf if level.tpot_slo_s is None else level.tpot_slo_s

    def note(self, what: str, now: float, detail: str = "") -> None:
        """For its timeline."""
        if len(self.events) < MAX_EVENTS:
            self.events.append((now, what, detail))

    def engine_request(self, now: float) -> EngineRequest:
        """What a worker must know to begin it, or to go on with it. Of the time to the first token it gets
        what is left."""
        sampling = self.sampling
        if self.prompt_logprobs is not None:
            sampling = replace(sampling, prompt_logprobs=None)
        return EngineRequest(
            request_id=self.request_id,
            prompt_ids=self.prompt_ids,
            sampling=sampling,
            attempt=self.attempt,
            choice_index=self.choice_index,
            output_ids=tuple(self.output_ids),
            salt=self.salt,
            priority=self.level.priority,
            tpot_slo_s=self.level.tpot_slo_s,
            ttft_slo_s=self.level.ttft_left_s(now - self.arrived_at, bool(self.output_ids)),
        )

    def accept(self, output: wire.Message, now: float) -> Verdict:
        """Take one output as it came over the wire."""
        if output[1] != self.attempt or self.finished is not None:
            return Verdict.STALE
        output_ids = self.output_ids
        if output[2] != len(output_ids):
            return Verdict.GAP if output[2] > len(output_ids) else Verdict.STALE
        if len(output) == 4 and self._plain:  # nearly always: one more token, nothing else
            token_ids = output[3]
            output_ids.extend(token_ids)
            text = self.detokenizer.feed(token_ids)
            self.token_at = now
            if now - self.first_token_at > self._tpot_slo_s * (output[2] + GRACE_TOKENS):
                self.late = True
            self.sink.emit(self, text, token_ids, (), None)
            return Verdict.TAKEN
        return self._accept(wire.unpack_output(output), now)

    def _accept(self, output: SequenceOutput, now: float) -> Verdict:
        if output.events:
            self._note_events(output)
        if output.finish_reason in ("error", "abort"):  # an abort that we did not ask for has no error
            self.error, self.retry_after_s = output.error, output.retry_after_s
            return Verdict.REFUSED
        if output.prompt_logprobs is not None and self.prompt_logprobs is None:
            self.prompt_logprobs = output.prompt_logprobs
        if not self.output_ids:
            self.num_cached_tokens = output.num_cached_tokens
            self.queue_time_s = output.queue_time_s
        if output.token_ids:
            self.token_at = now
            self.first_token_at = self.first_token_at or now
            if now - self.first_token_at > self._tpot_slo_s * (output.output_index + GRACE_TOKENS):
                self.late = True
        return self._take(output)

    def _note_events(self, output: SequenceOutput) -> None:
        """A worker's times count from when the sequence came to it."""
        came = next((at for at, what, _ in reversed(self.events) if what == "sent"), self.arrived_at)
        for what, at_s, tokens in output.events:
            self.note(what, came + at_s, f"{tokens} tokens" if tokens else "")

    def _take(self, output: SequenceOutput) -> Verdict:
        """Token by token, since a stop string may end the text within the output."""
        first = len(self.output_ids)
        pieces = []
        silent = output.stop_token_id is not None and not self._include_stop
        last = len(output.token_ids) - 1
        for i, token_id in enumerate(output.token_ids):
            logprobs = None if output.logprobs is None else output.logprobs[i]
            pieces.append(self._add(token_id, logprobs, show=not (silent and i == last)))
            if self._matched:
                break
        if self._matched:
            self._finish("stop", "".join(pieces), first)
            return Verdict.ENDED if output.finish_reason is not None else Verdict.STOPPED
        if output.finish_reason is not None:
            pieces.append(self._rest())
            self._finish(output.finish_reason, "".join(pieces), first)
            return Verdict.ENDED
        text = "".join(pieces)
        self.sink.emit(self, text, self.output_ids[first:], self._release(len(text)), None)
        return Verdict.TAKEN

    @property
    def _matched(self) -> bool:
        return self._matcher is not None and self._matcher.matched

    def _add(self, token_id: int, logprobs: TokenLogprobs | None, show: bool) -> str:
        self.output_ids.append(token_id)
        if logprobs is not None:
            self._scored.append(ScoredToken(token_id, self._length, logprobs))
        text = self.detokenizer.feed((token_id,)) if show else ""
        self._length += len(text)
        if self._matcher is None:
            return text
        if len(self.output_ids) <= self._min_tokens:
            return self._matcher.skip(text)
        return self._matcher.push(text)

    def _rest(self) -> str:
        """What was held back: half characters, and a stop string that did not come."""
        text = self.detokenizer.flush()
        self._length += len(text)
        if self._matcher is None:
            return text
        text = self._matcher.push(text)
        return text if self._matcher.matched else text + self._matcher.flush()

    def _finish(self, reason: FinishReason, text: str, first: int) -> None:
        self.finished = "stop" if self._matched else reason
        if not self._matched:
            self._shown = self._length + 1  # whatever is left goes out
        self.sink.emit(self, text, self.output_ids[first:], self._release(len(text)), self.finished)

    def _release(self, num_chars: int) -> list[ScoredToken]:
        """The scored tokens whose text begins in what has been shown."""
        if not self._scored:
            self._shown += num_chars
            return []
        self._shown += num_chars
        count = sum(1 for scored in self._scored if scored.offset < self._shown)
        released, self._scored = self._scored[:count], self._scored[count:]
        return released
