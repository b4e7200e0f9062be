"""A sequence takes each token once, whatever order, repetition or loss its outputs come with."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.router_server import FOLDER

from ellm.router.sequence import ScoredToken, Sequence, Verdict
from ellm.router.stop_strings import StopMatcher, StopStrings
from ellm.router.tokenizer import Tokenizer
from ellm.worker.api import wire
from ellm.worker.api.errors import EllmError
from ellm.worker.api.output import FinishReason, SequenceOutput, TokenLogprobs
from ellm.worker.api.request import SamplingParams

TOKENIZER = Tokenizer.load(FOLDER)
TEXT = "The quick brown fox, 你好 🎉 jumps over the lazy dog. " * 2
IDS = TOKENIZER.encode(TEXT, add_special_tokens=False)


@dataclass
class Heard:
    """A sink that remembers."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    scored: list[ScoredToken] = field(default_factory=list)
    reasons: list[FinishReason] = field(default_factory=list)

    def emit(
        self,
        sequence: Sequence,
        text: str,
        token_ids: Seq[int],
        scored: Seq[ScoredToken],
        finish_reason: FinishReason | None,
    ) -> None:
        assert not self.reasons, "something came after the end"
        self.text += text
        self.token_ids.extend(token_ids)
        self.scored.extend(scored)
        if finish_reason is not None:
            self.reasons.append(finish_reason)

    def fail(self, sequence: Sequence, error: EllmError) -> None:
        raise AssertionError(error)


def make(sink: Heard, **sampling: Any) -> Sequence:
    params = SamplingParams(max_tokens=len(IDS), **sampling)
    return Sequence("r-0", 0, (5, 6, 7), params, sink, TOKENIZER.detokenizer())


def output(sequence: Sequence, start: int, end: int, attempt: int | None = None) -> wire.Message:
    """What a worker says of tokens [start, end), as it comes over the wire."""
    scored = None
    if sequence.sampling.logprobs is not None:
        scored = tuple(TokenLogprobs(-float(i), 1) for i in range(start, end))
    return wire.pack_output(
        SequenceOutput(
            sequence.request_id,
            sequence.attempt if attempt is None else attempt,
            start,
            tuple(IDS[start:end]),
            "length" if end == len(IDS) else None,
            logprobs=scored,
        )
    )


@given(st.data())
def test_every_token_is_taken_once(data: st.DataObject) -> None:
    """Chunks of any length, said again, lost, or of a worker that was given up."""
    sink = Heard()
    stops = data.draw(st.sampled_from([[], ["nothing of it"], ["lazy d", "🎉 jum"]]))
    sequence = make(sink, logprobs=data.draw(st.sampled_from([None, 0])))
    if stops:
        sequence.stop_at(StopMatcher(StopStrings(stops)), False)
    now = 0.0
    while sequence.finished is None:
        now += 1.0
        have = len(sequence.output_ids)
        what = data.draw(st.sampled_from(["next", "next", "next", "again", "old attempt", "lost"]))
        end = min(len(IDS), have + data.draw(st.integers(1, 4)))
        if what == "next":
            verdict = sequence.accept(output(sequence, have, end), now)
            assert verdict in (Verdict.TAKEN, Verdict.ENDED, Verdict.STOPPED)
        elif what == "again" and have:
            start = data.draw(st.integers(0, have - 1))
            assert sequence.accept(output(sequence, start, have), now) is Verdict.STALE
        elif what == "old attempt" and sequence.attempt:
            assert sequence.accept(output(sequence, have, end, 0), now) is Verdict.STALE
        elif what == "lost" and end < len(IDS) - 1:
            assert sequence.accept(output(sequence, end, end + 1), now) is Verdict.GAP
            sequence.attempt += 1
            request = sequence.engine_request(now)
            assert request.output_ids == tuple(IDS[:have])
            assert request.prompt_ids == (5, 6, 7)
    expected = TEXT.split("🎉 jum")[0] if "lazy d" in stops else TEXT
    assert sink.text == expected
    assert sink.token_ids == IDS[: len(sink.token_ids)] == sequence.output_ids
    assert sequence.finished == ("stop" if "lazy d" in stops else "length")
    assert sequence.accept(output(sequence, len(IDS) - 1, len(IDS)), now) is Verdict.STALE
    if sequence.sampling.logprobs is not None:
        assert [s.token_id for s in sink.scored] == IDS[: len(sink.scored)]
        offsets = [s.offset for s in sink.scored]
        assert offsets == sorted(offsets)
        assert offsets[-1] < len(sink.text)
        if not stops:
            assert len(offsets) == len(IDS)


def test_scores_come_with_the_text_that_they_score() -> None:
    """While a stop string may yet come, neither its text nor its scores are shown."""
    sink = Heard()
    sequence = make(sink, logprobs=0)
    sequence.stop_at(StopMatcher(StopStrings(["quick brown cat"])), False)
    at = 0
    while "quick brown" not in TOKENIZER.decode(IDS[:at]):
        sequence.accept(output(sequence, at, at + 1), 0.0)
        at += 1
    assert sink.text == "The "
    assert all(s.offset < 4 for s in sink.scored)
    sequence.accept(output(sequence, at, len(IDS)), 0.0)
    assert sink.text == TEXT
    assert len(sink.scored) == len(IDS)


def test_prompt_scores_are_asked_for_once() -> None:
    sequence = make(Heard(), prompt_logprobs=0)
    first = SequenceOutput("r-0", 0, 0, (IDS[0],), prompt_logprobs=(None, TokenLogprobs(-1.0, 1)))
    assert sequence.engine_request(0.0).sampling.prompt_logprobs == 0
    sequence.accept(wire.pack_output(first), 0.0)
    assert sequence.prompt_logprobs is not None
    assert sequence.engine_request(0.0).sampling.prompt_logprobs is None


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_a_refusal_ends_nothing_yet(reason: FinishReason) -> None:
    """Whether the request moves or fails is the dispatcher's."""
    sequence = make(Heard())
    refusal = SequenceOutput("r-0", 0, 0, (), reason, error=("unavailable", "draining"))
    assert sequence.accept(wire.pack_output(refusal), 0.0) is Verdict.REFUSED
    assert sequence.finished is None
    assert sequence.error == ("unavailable", "draining")


def test_times_are_of_the_first_and_the_last_token() -> None:
    sequence = make(Heard())
    sequence.accept(output(sequence, 0, 1), 5.0)
    sequence.accept(output(sequence, 1, 2), 6.0)
    assert (sequence.first_token_at, sequence.token_at) == (5.0, 6.0)
