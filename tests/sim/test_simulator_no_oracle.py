"""No oracle: the engine decides without knowing how long outputs will be.

Long outputs are exchanged among their requests. Until the first of them ends in one of the two worlds and not
in the other, every plan must be the same in both; a policy that looks at true lengths is caught.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile
from random import Random

import pytest

from ellm.loadtest.sim.replica import Replica
from ellm.loadtest.sim.run import make_core, make_executor
from ellm.loadtest.sim.setting import Setting, offer
from ellm.loadtest.sim.workload import SimRequest
from ellm.worker.engine.core import EngineCore
from ellm.worker.engine.plan import BatchPlan
from ellm.worker.engine.policies import POLICIES, Policy
from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState

# Room for about twelve requests of 60 that come at once.
SETTING = Setting(kv_bytes=12e9, rate=20.0, num_requests=60, tpot_slo_ms=45.0, host_gb=4.0)
LONG = 1_200  # tokens; a third of the outputs is longer
ARGUMENTS = {"literal": "literal(0.3)"}

Decision = tuple[float, int]  # when, and a digest of the plan


class Stop(Exception):
    """Enough was seen."""


def digest(plan: BatchPlan) -> int:
    """Who runs with which rows on which blocks, who came, who went, and what is copied."""
    return hash(
        (
            tuple(
                (e.seq_id, e.start, e.num_tokens, e.samples, e.recompute, tuple(e.block_ids))
                for e in plan.entries
            ),
            tuple((new.seq_id, new.sampling.seed, len(new.output_ids)) for new in plan.new),
            plan.released,
            tuple((c.block, c.host_block) for c in (*plan.saves, *plan.loads)),
            plan.waits,
        )
    )


def decisions(
    core: EngineCore, requests: list[SimRequest], until: float = float("inf")
) -> tuple[list[Decision], Replica]:
    """Every plan made before `until`, in order."""
    seen: list[Decision] = []

    def on_plan(plan: BatchPlan, now: float) -> None:
        if now >= until:
            raise Stop
        seen.append((now, digest(plan)))

    slo_s = SETTING.tpot_slo_ms / 1000
    replica = Replica(core, make_executor(SETTING, requests), requests, tpot_slo_s=slo_s, on_plan=on_plan)
    return seen, replica


def shuffled(requests: list[SimRequest]) -> list[SimRequest]:
    """The same requests, with the long outputs dealt out anew."""
    places = [i for i, request in enumerate(requests) if request.output_tokens > LONG]
    lengths = [requests[i].output_tokens for i in places]
    Random(5).shuffle(lengths)
    other = list(requests)
    for place, length in zip(places, lengths, strict=True):
        other[place] = replace(other[place], output_tokens=length)
    return other


def compare(make: object) -> tuple[list[Decision], list[Decision]]:
    """Decisions in both worlds up to the moment at which they first differ in what has been seen."""
    requests = offer(SETTING, 1).requests
    other = shuffled(requests)
    assert callable(make)
    seen, replica = decisions(make(requests), requests)
    trajectory = replica.run()
    # The earlier of its two ends, for each request whose length has changed: what the engine sees at last.
    visible = min(
        times[min(one.output_tokens, two.output_tokens) - 1]
        for times, one, two in zip(trajectory.token_times, requests, other, strict=True)
        if one.output_tokens != two.output_tokens
    )
    seen_too, replica_too = decisions(make(other), other, until=visible)
    with pytest.raises(Stop):
        replica_too.run()
    return list(takewhile(lambda decision: decision[0] < visible, seen)), seen_too


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_what_is_to_come_changes_no_decision(name: str) -> None:
    policy = ARGUMENTS.get(name, name)
    first, second = compare(lambda requests: make_core(SETTING, policy))
    assert len(first) > 1_000  # a long time, under pressure
    assert first == second


class Oracle(Policy):
    """Knows the true lengths, and lets long outputs in only while few others run."""

    def __init__(self, requests: list[SimRequest]) -> None:
        self._lengths = [request.output_tokens for request in requests]

    def may_admit(self, state: EngineState, seq: Sequence, num_blocks: int, now: float) -> bool:
        is_long = self._lengths[seq.request.sampling.seed] > 2 * LONG
        return super().may_admit(state, seq, num_blocks, now) and not (is_long and len(state.running) > 3)


def test_an_oracle_is_caught() -> None:
    def make(requests: list[SimRequest]) -> EngineCore:
        core = make_core(SETTING, "full-chunked")
        return EngineCore(core.limits, core.config, policy=Oracle(requests))

    first, second = compare(make)
    assert first != second
