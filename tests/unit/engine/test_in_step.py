"""`adaptive` with transient blocks: when a part of each request is recomputed in every step, and when not."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from support.engine_driver import LIMITS, EngineDriver, request, run_alone

from ellm.worker.api.config import SchedulerConfig
from ellm.worker.api.request import EngineRequest
from ellm.worker.engine.hole import Hole
from ellm.worker.engine.holes import Holes
from ellm.worker.engine.sequence import Sequence

STARVED = 16  # blocks of 4 tokens, where a request ends at 46: a row costs 1 % of a step


def drive(
    num_blocks: int = STARVED,
    num_transient: int = 16,
    *,
    slo_ms: float | None = None,
    same_prompts: bool = False,
) -> EngineDriver:
    limits = replace(LIMITS, num_blocks=num_blocks, num_transient_blocks=num_transient)
    config = SchedulerConfig(policy="adaptive", max_step_tokens=64, watermark=0.0, tpot_slo_ms=slo_ms)
    driver = EngineDriver(limits, scheduler=config, prefix_caching=same_prompts)
    for i in range(16):
        driver.add(asked(i, same_prompts=same_prompts))
    driver.run()
    return driver


def asked(number: int, *, same_prompts: bool = False) -> EngineRequest:
    seed = 0 if same_prompts else number
    return request(f"r{number}", 9, seed=seed, max_tokens=37, ignore_eos=True)


def test_a_starved_memory_takes_more_requests_at_a_time() -> None:
    driver, without = drive(), drive(num_transient=0)
    report = driver.core.report(driver.now)
    assert report.hole_tokens > 1_000
    assert without.core.report(without.now).hole_tokens == 0
    assert driver.now < 0.9 * without.now


def test_no_token_changes() -> None:
    driver = drive()
    for name, stream in driver.streams.items():
        alone = run_alone(asked(int(name[1:])), LIMITS, None)
        assert stream == alone.streams[name]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_blocks": 400},  # all of them fit
        {"slo_ms": 11.0},  # a step that recomputes takes longer
        {"num_transient": 1},  # not enough for a hole worth its rows
    ],
)
def test_nothing_is_recomputed_where_it_does_not_pay(changes: dict[str, float]) -> None:
    driver = drive(**changes)  # type: ignore[arg-type]
    assert driver.core.report(driver.now).hole_tokens == 0
    assert all(reason == "length" for reason in driver.reasons.values())


def test_what_others_share_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole in it would free nothing."""
    given_up: list[int] = []
    plain = Holes.open

    def noted(self: Holes, seq: Sequence, hole: Hole) -> bool:
        held = seq.hole.end if seq.hole is not None else 0
        given_up.append(self._state.pool.references(seq.table.block_ids[held]))
        return plain(self, seq, hole)

    monkeypatch.setattr(Holes, "open", noted)
    driver = drive(same_prompts=True)
    assert driver.core.report(driver.now).prefix_hits > 0
    assert given_up
    assert set(given_up) == {1}


def test_the_share_moves_by_bounded_steps() -> None:
    """From one plan to the next, ten a second, by 0.05 at most: no plan turns the memory over at once."""
    limits = replace(LIMITS, num_blocks=STARVED, num_transient_blocks=16)
    config = SchedulerConfig(policy="adaptive", max_step_tokens=64, watermark=0.0)
    driver = EngineDriver(limits, scheduler=config, prefix_caching=False)
    for i in range(16):
        driver.add(asked(i))
    ratios = [0.0]
    while driver.core.has_work:
        driver.turn()
        ratios.append(driver.core._policy.in_step.ratio)  # type: ignore[attr-defined]
    assert max(ratios) > 0.2
    assert max(abs(after - before) for before, after in pairwise(ratios)) < 0.0501
