"""Hand-made plans: a scheduler that does exactly what a test says, without the brain.

A sequence's blocks are dealt from the top of the pool in an order that is not the order of its positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ellm.worker.api.request import SamplingParams
from ellm.worker.engine.plan import BatchPlan, NewSequence, PlanEntry, StepResult
from ellm.worker.executor.base import Executor

GREEDY = SamplingParams(temperature=0.0, max_tokens=1 << 20)


@dataclass
class Track:
    """One sequence under way."""

    seq_id: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    choice_index: int = 0
    outputs: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    computed: int = 0
    known: bool = False  # to the executor
    sampled: bool = False  # the executor knows its last token
    results: list[StepResult] = field(default_factory=list)

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.prompt, *self.outputs)


class PlanDriver:
    """Builds plans for an executor and keeps the sequences' state."""

    def __init__(self, executor: Executor, *, feed_back: bool = True) -> None:
        self.executor = executor
        self.tracks: dict[int, Track] = {}
        self._step = 0
        self._released: list[int] = []
        self._feed_back = feed_back  # False: decode rows name no token, the executor knows it
        limits = executor.limits
        self._block_size = limits.block_size
        blocks = list(range(limits.num_blocks))
        self._free = blocks[1::2] + blocks[0::2]

    def add(
        self,
        seq_id: int,
        prompt: Sequence[int],
        sampling: SamplingParams = GREEDY,
        outputs: Sequence[int] = (),
        choice_index: int = 0,
    ) -> Track:
        track = Track(seq_id, tuple(prompt), sampling, choice_index, list(outputs))
        self.tracks[seq_id] = track
        return track

    def release(self, seq_id: int) -> None:
        """Forget a sequence; its blocks go back to the pool."""
        track = self.tracks.pop(seq_id)
        self._free.extend(track.block_ids)
        self._released.append(seq_id)

    def step(self, rows: Mapping[int, int]) -> StepResult:
        """One plan: seq_id -> how many of its tokens to compute. The last known token samples."""
        return self.run(self.plan(rows))

    def plan(self, rows: Mapping[int, int]) -> BatchPlan:
        """The plan of `step`, to be run next."""
        entries, new = [], []
        for seq_id in sorted(rows, key=lambda s: rows[s] != 1):
            track = self.tracks[seq_id]
            if not track.known:
                new.append(
                    NewSequence(
                        seq_id, track.prompt, tuple(track.outputs), track.sampling, track.choice_index
                    )
                )
                track.known = True
            entries.append(self._entry(track, rows[seq_id]))
        num_decode = sum(e.num_tokens == 1 and e.samples for e in entries)
        plan = BatchPlan(
            self._step,
            tuple(entries),
            tuple(new),
            tuple(self._released),
            sum(e.num_tokens for e in entries),
            num_decode,
        )
        self._step += 1
        self._released = []
        return plan

    def run(self, plan: BatchPlan) -> StepResult:
        """Execute a plan and keep what it gave."""
        result = self.executor.execute(plan)
        assert result.step == plan.step
        self._accept(plan.entries, result)
        return result

    def _entry(self, track: Track, count: int) -> PlanEntry:
        start, end = track.computed, track.computed + count
        assert 0 < count <= len(track.tokens) - start
        while len(track.block_ids) * self._block_size < end:
            track.block_ids.append(self._free.pop())
        samples = end == len(track.tokens)
        hidden = samples and count == 1 and track.sampled and not self._feed_back
        return PlanEntry(
            track.seq_id,
            start,
            count,
            () if hidden else track.tokens[start:end],
            track.block_ids,
            samples,
            len(track.outputs) if samples else 0,
            track.sampling.prompt_logprobs is not None and start < len(track.prompt) - 1,
        )

    def _accept(self, entries: Sequence[PlanEntry], result: StepResult) -> None:
        tokens = iter(result.token_ids)
        for entry in entries:
            if entry.recompute:
                continue
            track = self.tracks[entry.seq_id]
            track.computed += entry.num_tokens
            track.results.append(dataclasses.replace(result))
            if entry.samples:
                track.outputs.append(next(tokens))
                track.sampled = True
        assert next(tokens, None) is None

    def generate(self, seq_id: int, num_tokens: int, chunk: int = 1 << 20) -> list[int]:
        """Run one sequence alone until it has `num_tokens` outputs."""
        track = self.tracks[seq_id]
        while len(track.outputs) < num_tokens:
            self.step({seq_id: min(chunk, len(track.tokens) - track.computed)})
        return track.outputs
