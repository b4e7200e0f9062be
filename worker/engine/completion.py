"""What a finished step means: tokens accepted, blocks named in the prefix index, sequences ended.

The only place where tokens enter a sequence. A token sampled for a sequence that has meanwhile ended is
dropped; one sampled for a sequence that was preempted in the meantime is kept.
"""

from __future__ import annotations

from ellm.worker.api.errors import InvalidRequest
from ellm.worker.api.output import FinishReason, SequenceOutput, TokenLogprobs
from ellm.worker.engine.plan import PlanEntry, StepResult
from ellm.worker.engine.policies.base import Policy
from ellm.worker.engine.residency import Residency
from ellm.worker.engine.scheduler import ScheduledStep
from ellm.worker.engine.sequence import Sequence, SequenceState
from ellm.worker.engine.state import EngineState


class Completion:
    """Applies step results to the state; one per engine."""

    def __init__(self, state: EngineState, policy: Policy, residency: Residency) -> None:
        self._state = state
        self._policy = policy
        self._residency = residency

    def apply(self, step: ScheduledStep, result: StepResult, now: float) -> list[SequenceOutput]:
        """One output for every sequence that got a token or ended, in the plan's order."""
        self._residency.apply_copies(result)
        outputs: list[SequenceOutput] = []
        num_samples = sum(entry.samples for entry in step.plan.entries)
        assert len(result.token_ids) == num_samples, "wrong number of tokens in a result"
        tokens = iter(result.token_ids)
        state = self._state
        block_size, commits = state.block_size, state.indexes
        running, finished = SequenceState.RUNNING, SequenceState.FINISHED
        for entry, seq in zip(step.plan.entries, step.sequences, strict=True):
            if entry.recompute:  # it left nothing behind; the sequence's other entry stands for both
                state.totals.recomputed_tokens += entry.num_tokens
                state.totals.hole_tokens += entry.num_tokens
                continue
            token = next(tokens) if entry.samples else -1
            before = seq.state
            seq.num_outstanding -= 1
            if before is not finished:
                end = seq.num_computed = entry.start + entry.num_tokens
                if commits and end // block_size > seq.num_committed:
                    self._commit(seq, end // block_size)
                if entry.start < seq.high_water or entry.prompt_logprobs:
                    self._count(seq, entry, end, result, now)
                if end > seq.high_water:
                    seq.high_water = end
                self._residency.close_gap(seq)
                if token >= 0:
                    outputs.append(self._sampled(seq, entry, token, result, now))
                elif seq.prefill_only and end == seq.num_prompt:
                    outputs.append(self._end_scored(seq, now))
            if before is not running:
                state.plan_returned(seq)
        return outputs

    def _commit(self, seq: Sequence, num_full: int) -> None:
        """Blocks that have become full, all with accepted tokens, can be hit from now on."""
        index, block_ids = self._state.pool.index, seq.table.block_ids
        hashes = seq.hashes(num_full, self._state.block_size)
        for i in range(seq.num_committed, num_full):
            index.insert(hashes[i], block_ids[i], i + 1)
        seq.num_committed = num_full

    def _count(self, seq: Sequence, entry: PlanEntry, end: int, result: StepResult, now: float) -> None:
        """Work done twice, and the scores of a chunk."""
        if entry.start < seq.high_water:
            again = min(end, seq.high_water) - entry.start
            self._state.totals.recomputed_tokens += again
            seq.redone += again
            if end >= seq.high_water:  # it is where it was
                seq.note("recomputed", now, seq.redone)
                seq.redone = 0
        if entry.prompt_logprobs:
            assert result.prompt_logprobs is not None
            assert seq.prompt_logprobs is not None
            scores = result.prompt_logprobs[entry.seq_id]
            have = len(seq.prompt_logprobs)
            seq.prompt_logprobs.extend(scores[have - entry.start - 1 :])

    def _note_time(self, seq: Sequence, now: float) -> None:
        """Token i is due at t_first + SLO * (i + 4): the definition of attainment, for every token."""
        first = seq.first_token_at
        if first is None:
            seq.first_token_at, seq.first_index = now, len(seq.tokens)
            if seq.ttft_slo_s is not None and not seq.request.output_ids:
                seq.late = now > seq.arrived_at + seq.ttft_slo_s
        elif seq.tpot_slo_s is not None and not seq.late:
            seq.late = now > first + seq.tpot_slo_s * (len(seq.tokens) - seq.first_index + 4)

    def _sampled(
        self, seq: Sequence, entry: PlanEntry, token: int, result: StepResult, now: float
    ) -> SequenceOutput:
        error = None if result.errors is None else result.errors.get(entry.seq_id)
        if error is None:
            return self._accept(seq, entry, token, result, now)
        self._policy.aborted(seq, now)
        self._state.finish(seq)
        request = seq.request
        code = (InvalidRequest.code, error)
        return SequenceOutput(
            request.request_id, request.attempt, len(seq.tokens) - seq.num_prompt, (), "error", error=code
        )

    def _accept(
        self, seq: Sequence, entry: PlanEntry, token: int, result: StepResult, now: float
    ) -> SequenceOutput:
        tokens, request = seq.tokens, seq.request
        self._note_time(seq, now)
        index = entry.output_index
        assert index == len(tokens) - seq.num_prompt, "a token came out of order"
        tokens.append(token)
        self._state.totals.generation_tokens += 1
        reason: FinishReason | None = None
        stop_token_id: int | None = None
        if token in seq.stop_ids and len(tokens) >= seq.min_total:
            reason, stop_token_id = "stop", token
        elif len(tokens) >= seq.max_total:
            reason = "length"
        logprobs: tuple[TokenLogprobs, ...] | None = None
        if request.sampling.logprobs is not None:
            assert result.logprobs is not None
            logprobs = (result.logprobs[entry.seq_id],)
        self._policy.emitted(seq, now)
        if reason is not None:
            if seq.tpot_slo_s is not None or seq.ttft_slo_s is not None:
                self._state.kept.append((now, not seq.late))
            self._policy.finished(seq, now)
            self._state.finish(seq)
        return SequenceOutput(
            request.request_id,
            request.attempt,
            index,
            (token,),
            reason,
            stop_token_id,
            logprobs,
            self._prompt_scores(seq) if index == 0 else None,
            seq.num_cached_tokens or 0,
            queue_time_s=seq.admitted_at - seq.arrived_at if index == 0 else 0.0,
            events=seq.take_events() if seq.events else (),
        )

    def _end_scored(self, seq: Sequence, now: float) -> SequenceOutput:
        """The end of a request that wanted its prompt scored and no token."""
        self._policy.aborted(seq, now)  # an end from which no output's length can be learnt
        self._state.finish(seq)
        return SequenceOutput(
            seq.request.request_id,
            seq.request.attempt,
            0,
            (),
            "length",
            prompt_logprobs=self._prompt_scores(seq),
            num_cached_tokens=seq.num_cached_tokens or 0,
        )

    def _prompt_scores(self, seq: Sequence) -> tuple[TokenLogprobs | None, ...] | None:
        if seq.prompt_logprobs is None:
            return None
        assert len(seq.prompt_logprobs) == seq.num_prompt, "a prompt token was not scored"
        return tuple(seq.prompt_logprobs)
