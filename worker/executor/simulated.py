"""An executor without a model: its tokens are a pure function of what a sequence has said so far.

The next token depends on (seed, choice index, all tokens before it) and on nothing else, so a stream that is
not the same under another batch, chunking, preemption or failover shows a wrong plan. With `verify` it looks
at each plan as hardware would: a pool of slots holds, for every position written, a digest of the tokens up
to it, and an entry that attends to a slot with another content raises PlanViolation. Elapsed time comes from
a cost model; the caller advances its own clock by it, or lets the executor sleep.

True output lengths, where a test or a simulation has them, are known here and nowhere above.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ellm.worker.api.cost_model import CostModel
from ellm.worker.api.output import TokenLogprobs
from ellm.worker.api.request import SamplingParams
from ellm.worker.engine.plan import (
    BatchPlan,
    BlockCopy,
    CopyTimes,
    ModelLimits,
    NewSequence,
    PlanEntry,
    StepResult,
    step_features,
)
from ellm.worker.executor.simulated_copies import CopiedSlots, PlanViolation
from ellm.worker.executor.simulated_link import LinkSpeed, SimulatedLink

_MASK = (1 << 64) - 1
_EMPTY = 0x243F6A8885A308D3  # digest of no token


def _num_slots(limits: ModelLimits) -> int:
    return (limits.num_blocks + limits.num_transient_blocks) * limits.block_size


def _mix(x: int) -> int:
    """A bijection of 64 bits that leaves no pattern (the finaliser of splitmix64, Steele et al. 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@dataclass(slots=True)
class _Resident:
    """What an executor keeps of a sequence from its first plan until it is released."""

    tokens: list[int]
    digests: list[int]  # entry i: of tokens[: i + 1]
    num_prompt: int
    sampling: SamplingParams
    noise: int
    eos_at: int | None  # output index at which it says end-of-text
    sampled_by: int = -2  # step that sampled the newest token

    def append(self, token: int) -> None:
        last = self.digests[-1] if self.digests else _EMPTY
        self.tokens.append(token)
        self.digests.append(_mix(last ^ (token * 0x2545F4914F6CDD1D & _MASK)))


class SimulatedExecutor:
    """Carries out plans on nothing but a cost model.

    `output_length(new)` is the number of tokens after which a sequence says end-of-text by itself, None for
    one that never does; it may depend on prompt, sampling and choice only. With `ignore_eos` it goes on.
    """

    def __init__(
        self,
        limits: ModelLimits,
        cost_model: CostModel,
        *,
        output_length: Callable[[NewSequence], int | None] | None = None,
        verify: bool = True,
        realtime: bool = False,
        link: LinkSpeed | None = None,
        copy_fails: Callable[[BlockCopy], bool] | None = None,
    ) -> None:
        self._limits = limits
        self._cost_model = cost_model
        self._output_length = output_length
        self._verify = verify
        self._realtime = realtime
        self._eos = frozenset(limits.eos_token_ids)
        self._residents: dict[int, _Resident] = {}
        self._slots: list[int | None] = [None] * (_num_slots(limits) if verify else 0)
        self._next_step = 0
        self._clock = 0.0
        self._link = SimulatedLink(link or LinkSpeed(), limits.block_bytes)
        self._copy_fails = copy_fails or (lambda copy: False)
        self._memories = CopiedSlots(limits, self._slots) if verify else None

    @property
    def limits(self) -> ModelLimits:
        return self._limits

    @property
    def num_residents(self) -> int:
        """Sequences that were sent and not released."""
        return len(self._residents)

    def execute(self, plan: BatchPlan) -> StepResult:
        """Sample every entry that asks for it. Raises PlanViolation for a plan that could not work."""
        self._take(plan)
        stall_s = self._start_copies(plan)
        if self._verify and plan.entries:
            self._check_shape(plan)
            self._write_slots(plan)
            for entry in plan.entries:
                self._check_slots(entry)
            first = self._limits.num_blocks * self._limits.block_size
            self._slots[first:] = [None] * (
                len(self._slots) - first
            )  # each layer of each step fills them anew
        token_ids: list[int] = []
        logprobs: dict[int, TokenLogprobs] = {}
        scores: dict[int, tuple[TokenLogprobs, ...]] = {}
        for entry in plan.entries:
            resident = self._residents[entry.seq_id]
            if entry.prompt_logprobs:
                scores[entry.seq_id] = self._score(resident, entry)
            if not entry.samples:
                continue
            digest = _mix(resident.digests[-1] ^ resident.noise)
            token = self._sample(resident, digest)
            if resident.sampling.logprobs is not None:
                logprobs[entry.seq_id] = self._logprobs(token, digest, resident.sampling.logprobs)
            resident.append(token)
            resident.sampled_by = plan.step
            token_ids.append(token)
        elapsed_s = stall_s + (self._cost_model.predict(step_features(plan)) if plan.entries else 0.0)
        elapsed_s = max(elapsed_s, self._link.seconds(len(plan.streams)))
        if self._realtime:
            time.sleep(elapsed_s)
        self._clock += elapsed_s
        done, failed, times = self._end_copies()
        return StepResult(
            plan.step, tuple(token_ids), elapsed_s, logprobs or None, scores or None, done, failed, times
        )

    def _start_copies(self, plan: BatchPlan) -> float:
        """Returns the seconds until the step can begin."""
        if self._memories is not None:
            self._memories.start(plan)
        link = self._link
        link.start(plan.saves, self._clock, save=True)
        link.start(plan.loads, self._clock, save=False)
        if plan.waits:
            return max(0.0, link.last_end - self._clock)
        if plan.entries:
            return 0.0
        if link.next_end is None:
            raise PlanViolation("a plan without entries, and no copy to wait for")
        return max(0.0, link.next_end - self._clock)

    def _end_copies(self) -> tuple[tuple[int, ...], tuple[int, ...], CopyTimes | None]:
        saves, loads, times = self._link.ended(self._clock)
        failed = tuple(copy.copy_id for copy in (*saves, *loads) if self._copy_fails(copy))
        if self._memories is not None:
            self._memories.end(saves, loads, failed)
        return tuple(copy.copy_id for copy in (*saves, *loads)), failed, times

    def close(self) -> None:
        self._residents.clear()
        self._slots.clear()

    def _take(self, plan: BatchPlan) -> None:
        """Learn who came and who went."""
        if plan.step != self._next_step:
            raise PlanViolation(f"plan {plan.step} came where {self._next_step} was due")
        self._next_step += 1
        for seq_id in plan.released:
            if self._residents.pop(seq_id, None) is None:
                raise PlanViolation(f"sequence {seq_id} was released and is not here")
        for new in plan.new:
            if new.seq_id in self._residents:
                raise PlanViolation(f"sequence {new.seq_id} came twice")
            length = self._output_length(new) if self._output_length else None
            noise = _mix(new.sampling.seed ^ _mix(new.choice_index))
            eos_at = None if length is None else max(length, new.sampling.min_tokens, 1) - 1
            resident = _Resident([], [], len(new.prompt_ids), new.sampling, noise, eos_at)
            for token in (*new.prompt_ids, *new.output_ids):
                resident.append(token)
            self._residents[new.seq_id] = resident

    def _sample(self, resident: _Resident, digest: int) -> int:
        """The next token; end-of-text only where the length rule wants it."""
        if len(resident.tokens) - resident.num_prompt == resident.eos_at and self._eos:
            return min(self._eos)
        token = digest % self._limits.vocab_size
        while token in self._eos:
            token = (token + 1) % self._limits.vocab_size
        return token

    def _logprobs(self, token: int, digest: int, count: int) -> TokenLogprobs:
        """Made up, but a pure function of the history, and ordered as real ones are."""
        logprob = -(digest % 1000) / 1000
        top = ((token + i) % self._limits.vocab_size for i in range(count))
        return TokenLogprobs(logprob, 1, tuple((t, logprob - i) for i, t in enumerate(top)))

    def _score(self, resident: _Resident, entry: PlanEntry) -> tuple[TokenLogprobs, ...]:
        last = min(entry.start + entry.num_tokens, resident.num_prompt - 1)
        count = resident.sampling.prompt_logprobs or 0
        return tuple(
            self._logprobs(resident.tokens[i + 1], resident.digests[i], count)
            for i in range(entry.start, last)
        )

    def _check_shape(self, plan: BatchPlan) -> None:
        """The promises that BatchPlan and PlanEntry make in their docstrings."""
        entries = plan.entries
        if sum(entry.num_tokens for entry in entries) != plan.num_rows:
            raise PlanViolation("wrong number of rows")
        parts = [2 if e.recompute else int(e.num_tokens > 1) for e in entries]
        if parts != sorted(parts):
            raise PlanViolation("single rows, chunks and recompute rows are not in this order")
        decode = [entry.num_tokens == 1 and entry.samples for entry in entries]
        if sum(decode) != plan.num_decode or not all(decode[: plan.num_decode]):
            raise PlanViolation("the decode rows are not the first num_decode entries")
        if len({(entry.seq_id, entry.recompute) for entry in entries}) != len(entries):
            raise PlanViolation("a sequence has two entries")
        for entry in entries:
            self._check_entry(entry, plan.step)

    def _check_entry(self, entry: PlanEntry, step: int) -> None:
        resident = self._residents.get(entry.seq_id)
        if resident is None:
            raise PlanViolation(f"sequence {entry.seq_id} is not here")
        end, known = entry.start + entry.num_tokens, len(resident.tokens)
        if not 0 <= entry.start < end <= known:
            raise PlanViolation(f"positions [{entry.start}, {end}) of {known} known ones")
        if entry.token_ids:
            if list(entry.token_ids) != resident.tokens[entry.start : end]:
                raise PlanViolation(f"sequence {entry.seq_id}: wrong input tokens")
        elif entry.num_tokens != 1 or end != known or resident.sampled_by != step - 1:
            raise PlanViolation(f"sequence {entry.seq_id}: the plan before did not sample its input token")
        if entry.samples and (end != known or entry.output_index != known - resident.num_prompt):
            raise PlanViolation(f"sequence {entry.seq_id}: samples at the wrong position")
        last = self._limits.num_blocks + self._limits.num_transient_blocks
        if any(not 0 <= block < last for block in entry.block_ids):
            raise PlanViolation("a block outside the pool")
        if entry.recompute:
            self._check_recompute(entry)
        if end > min(len(entry.block_ids) * self._limits.block_size, self._limits.max_model_len):
            raise PlanViolation(f"sequence {entry.seq_id}: no block for its last row, or past the context")

    def _check_recompute(self, entry: PlanEntry) -> None:
        size, first = self._limits.block_size, self._limits.num_blocks
        if entry.start % size or entry.num_tokens % size or entry.samples:
            raise PlanViolation(f"sequence {entry.seq_id}: recompute rows that are not whole blocks")
        blocks = entry.block_ids[entry.start // size : (entry.start + entry.num_tokens) // size]
        if min(blocks) < first:
            raise PlanViolation(f"sequence {entry.seq_id}: recompute rows over a block of its own")

    def _write_slots(self, plan: BatchPlan) -> None:
        """All rows of a step write before any of them reads, as the layers of a model do."""
        size = self._limits.block_size
        written: set[int] = set()
        if self._memories is not None:
            self._memories.stream(plan)
        for entry in plan.entries:
            digests = self._residents[entry.seq_id].digests
            for position in range(entry.start, entry.start + entry.num_tokens):
                slot = entry.block_ids[position // size] * size + position % size
                if slot in written:
                    raise PlanViolation(f"slot {slot} is written twice in one step")
                written.add(slot)
                self._slots[slot] = digests[position]

    def _check_slots(self, entry: PlanEntry) -> None:
        """Everything the entry attends to is what this sequence's tokens made."""
        size, end = self._limits.block_size, entry.start + entry.num_tokens
        digests = self._residents[entry.seq_id].digests
        for i, block in enumerate(entry.block_ids[: -(-end // size)]):
            first, last = i * size, min(end, (i + 1) * size)
            if self._slots[block * size : block * size + last - first] != digests[first:last]:
                raise PlanViolation(f"sequence {entry.seq_id}: block {block} does not hold [{first}, {last})")
