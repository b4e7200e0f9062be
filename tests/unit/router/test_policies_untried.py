"""A worker that was slow once, and has had nothing to do since, gets another chance."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ellm.router.policies import Replica, RoutedRequest
from ellm.router.policies.headroom import Headroom
from ellm.worker.api.report import WorkerReport

REQUEST = RoutedRequest(tuple(range(30)), output_tokens=128)
WELL = WorkerReport(
    seq=1, num_running=60, num_steps=5, num_blocks=1000, headroom_tokens=12_000, running_tokens=2_000,
    prefill_rate_tok_s=5_000.0, decode_step_s=(0.02, 1e-3, 1e-7), max_running=64,
)  # fmt: skip


def slow(running: int = 0, steps: int = 5) -> WorkerReport:
    """It took a minute for a prompt of 30 tokens when it was last asked."""
    return WorkerReport(
        seq=1, num_running=running, num_steps=steps, num_blocks=1000, headroom_tokens=16_000,
        prefill_rate_tok_s=0.5, decode_step_s=(1.0, 1.0, 0.0), max_running=64,
    )  # fmt: skip


def hear(replica: Replica, report: WorkerReport, now: float) -> None:
    replica.heard(report, "r", now)


@pytest.mark.parametrize(
    ("later", "chosen"), [(slow(), "slow"), (slow(running=1), "well"), (slow(steps=6), "well")],
    ids=["idle", "hangs with work", "has just run a step"],
)  # fmt: skip
def test_only_one_that_had_nothing_to_do_is_tried_again(later: WorkerReport, chosen: str) -> None:
    well, poor = Replica("well"), Replica("slow")
    hear(well, WELL, 0.0)
    hear(poor, slow(), 0.0)
    policy = Headroom(seed=1)
    first = policy.choose(REQUEST, [well, poor], 0.1)
    assert first is not None
    assert first.replica_id == "well"
    hear(well, WELL, 20.0)
    hear(poor, later, 20.0)
    second = policy.choose(REQUEST, [well, poor], 20.1)
    assert second is not None
    assert second.replica_id == chosen


def test_it_is_not_tried_before_one_that_is_known_to_be_well_and_as_free() -> None:
    well, poor = Replica("well"), Replica("slow")
    for now in (0.0, 20.0):
        hear(well, replace(WELL, num_running=0, num_steps=int(now)), now)
        hear(poor, slow(), now)
    policy = Headroom(seed=1)
    choices = {policy.choose(REQUEST, [well, poor], 20.1) for _ in range(20)}
    assert {choice.replica_id for choice in choices if choice is not None} == {"well"}
