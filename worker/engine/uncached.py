"""How much KV of the admitted requests is not there, and what it will take to have it back.

A known token of an admitted request is uncached when its KV was there once and is not now: it lies in a hole
and is filled anew in each step (recomputed, or streamed from the host), or it waits to be brought back (from
the host, or computed again). Reads the state; O(sequences), not O(tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

from ellm.worker.api.cost_model import CostModel, StepFeatures
from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState


@dataclass(slots=True)
class Uncached:
    """Tokens; the four kinds are disjoint."""

    known: int = 0  # of all admitted requests, cached or not
    parked: int = 0  # of the known, those of parked requests
    recomputing: int = 0  # in holes, recomputed within each step
    streaming: int = 0  # in holes, streamed within each step
    host: int = 0  # to be brought back, and the host has them
    dropped: int = 0  # to be computed again
    hole_pairs: int = 0  # (query, key) pairs that each step spends on recomputing
    hole_context: int = 0  # KV tokens that the recomputed rows read

    @property
    def total(self) -> int:
        return self.recomputing + self.streaming + self.host + self.dropped

    @property
    def ratio(self) -> float:
        return self.total / self.known if self.known else 0.0


def uncached(state: EngineState) -> Uncached:
    """Of the admitted requests at this moment."""
    found, size = Uncached(), state.block_size
    for seq in state.parked:
        found.known += len(seq.tokens)
        found.parked += len(seq.tokens)
        missing = max(0, min(seq.high_water, len(seq.tokens)) - seq.num_computed)
        on_host = min(missing, max(0, seq.num_saved * size - seq.num_computed))
        found.host += on_host
        found.dropped += missing - on_host
    for seq in state.running:
        found.known += len(seq.tokens)
        if seq.hole is not None:
            _add_hole(found, seq, size)
        elif seq.num_computed < seq.high_water:
            _add_gap(found, seq, size)
    return found


def _add_hole(found: Uncached, seq: Sequence, size: int) -> None:
    hole = seq.hole
    assert hole is not None
    rows = hole.num_rows(size)
    found.recomputing += rows
    found.streaming += hole.num_streamed * size
    if rows:
        found.hole_pairs += rows * hole.first * size + rows * (rows + 1) // 2
        found.hole_context += hole.split * size


def _add_gap(found: Uncached, seq: Sequence, size: int) -> None:
    gap = seq.gap
    if gap is None:
        found.dropped += seq.high_water - seq.num_computed
        return
    missing = max(0, seq.high_water - seq.num_computed - (gap.end - gap.ready) * size)
    # What lies before `ready` and was not computed from the front comes from the host.
    on_host = 0 if gap.failed else min(missing, gap.ready * size - max(gap.first * size, seq.num_computed))
    found.host += max(0, on_host)
    found.dropped += missing - max(0, on_host)


def debt_s(found: Uncached, state: EngineState, cost_model: CostModel, load_block_s: float) -> float:
    """Seconds: what holes add to the next step, and the time to bring back all that waits for it.

    `load_block_s`: of one block from the host. Dropped tokens count as chunks of as many rows as a step has
    left.
    """
    load_s = load_block_s / state.block_size
    num_decode = len(state.running)
    kv = found.known - found.parked
    base = cost_model.predict(StepFeatures(num_decode, num_decode, kv, 0, num_decode))
    seconds = 0.0
    if found.recomputing:
        rows, context = num_decode + found.recomputing, kv + found.hole_context
        with_holes = StepFeatures(rows, num_decode, context, found.hole_pairs, num_decode)
        seconds += max(0.0, cost_model.predict(with_holes) - base)
    if found.streaming:
        seconds += max(0.0, found.streaming * load_s - base)  # it hides under the step
    if found.dropped:
        chunk = min(found.dropped, max(1, state.config.max_step_tokens - num_decode))
        context = found.known // max(1, num_decode + len(state.parked))
        step = StepFeatures(num_decode + chunk, num_decode, kv + context, chunk * context // 2, num_decode)
        seconds += max(0.0, cost_model.predict(step) - base) * found.dropped / chunk
    return seconds + found.host * load_s
