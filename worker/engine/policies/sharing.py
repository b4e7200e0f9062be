"""What admission policies ask of requests: what those that share a prefix really take (a block that n of them
refer to counts a share of 1 / n), whose deadline binds, and whether there is anything to plan."""

from __future__ import annotations

from collections.abc import Iterable

from ellm.worker.cache.block_pool import BlockPool
from ellm.worker.engine.planner.admission import TIMELY
from ellm.worker.engine.planner.slack import seconds_per_token
from ellm.worker.engine.policies.forecast import Forecast
from ellm.worker.engine.residency import Residency
from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState


def shared_tokens(pool: BlockPool, seq: Sequence) -> int:
    """Tokens of `seq` that others pay for. Shared blocks lead; O(their number)."""
    others = 0.0
    for block in seq.table.block_ids:
        count = pool.references(block) if block < pool.num_blocks else 1
        if count < 2:
            break
        others += 1.0 - 1.0 / count
    return int(others * pool.block_size)


def found_tokens(state: EngineState, residency: Residency, seq: Sequence) -> int:
    """Tokens of `seq`, which waits, that are in blocks which somebody refers to: it takes none for them."""
    blocks = residency.find(seq).blocks
    return state.block_size * sum(state.pool.references(block) > 0 for block in blocks)


def tightest(seqs: Iterable[Sequence], forecast: Forecast) -> float | None:
    """Seconds per token of the tightest SLO that a lone request could keep; None if there is none. One that
    nobody could keep must not loosen, nor tighten, what others get."""
    alone_s = forecast.step_cost(1, 0)
    slos = {seq.tpot_slo_s for seq in seqs}
    limits = [seconds_per_token(slo) for slo in slos]
    return min((s for s in limits if s is not None and s >= alone_s), default=None)


def fits_at_full_length(state: EngineState, seq: Sequence, forecast: Forecast) -> bool:
    """Everybody who runs, and `seq`, would be in the pool at full length, blocks rounded up, in a step of its
    own seats, and in time: there is nothing to plan."""
    running, size = state.running, state.block_size
    most = sum([other.max_total for other in running]) + seq.max_total + size * (len(running) + 1)
    if most > state.pool.num_blocks * size or len(running) >= state.max_num_seqs:
        return False
    limit_s = tightest((*running, seq), forecast)
    return limit_s is None or forecast.step_cost(len(running) + 1, most) <= TIMELY * limit_s
