"""A step that a device has been asked for: what it says, on its way to the host.

Nothing here waits but `read`. On a CPU everything is there already.
"""

from __future__ import annotations

from dataclasses import dataclass

from ellm.worker.api.output import TokenLogprobs
from ellm.worker.engine.plan import PlanEntry
from ellm.worker.model.sampler import AskedScores
from ellm.worker.model.sequences import SequenceState
from ellm.worker.model.staging import ToHost

PromptScores = dict[int, tuple[TokenLogprobs, ...]]  # by seq_id


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step computed, read back from the device."""

    token_ids: list[int]  # one per entry that samples, in the plan's order
    logprobs: dict[int, TokenLogprobs] | None  # by seq_id
    prompt_logprobs: PromptScores | None
    errors: dict[int, str] | None = None  # by seq_id: whose grammar cannot go on


@dataclass(frozen=True, slots=True)
class BegunStep:
    """`sampling`: the entries that sample, and their sequences. `tokens`: theirs, [n] int64, where any does;
    None where nothing runs."""

    sampling: list[tuple[PlanEntry, SequenceState]]
    tokens: ToHost | None = None
    scores: AskedScores | None = None
    prompt_logprobs: PromptScores | None = None

    @property
    def ended(self) -> bool:
        """Whether `read` returns at once."""
        return self.tokens is None or self.tokens.there

    @property
    def feeds_back(self) -> bool:
        """Whether the next step's inputs depend on what `read` learns: penalties count tokens, and grammars
        follow them. All others find the last token on the device."""
        return any(state.counts is not None or state.grammar is not None for _, state in self.sampling)

    def wait(self) -> None:
        """Until `read` returns at once; from any thread."""
        if self.tokens is not None:
            self.tokens.wait()

    def read(self) -> StepOutput:
        """Wait for the step's end; penalties and grammars see its tokens. Once."""
        told = [] if self.tokens is None else self.tokens.wait()
        token_ids: list[int] = told[0].tolist() if told else []
        for (_, state), token in zip(self.sampling, token_ids, strict=True):
            if state.counts is not None:
                state.counts.add(token)
            if state.grammar is not None:
                state.grammar.add(token)
        logprobs = None
        if self.scores is not None:
            logprobs = {self.sampling[i][0].seq_id: score for i, score in self.scores.read().items()}
        return StepOutput(token_ids, logprobs, self.prompt_logprobs, self._errors())

    def _errors(self) -> dict[int, str] | None:
        """By seq_id, of grammars that have failed."""
        grammars = ((entry.seq_id, state.grammar) for entry, state in self.sampling)
        found = {
            seq_id: grammar.error for seq_id, grammar in grammars if grammar is not None and grammar.error
        }
        return found or None
