"""EngineCore.check notices damage to sequences and blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.engine_driver import EngineDriver, plain, request

from ellm.worker.engine.sequence import SequenceState
from ellm.worker.engine.state import EngineState


def engine_in_use() -> EngineDriver:
    """Two run, with a plan outstanding; one waits; one was aborted while its plan is out."""
    driver = EngineDriver(scheduler=plain(max_num_seqs=3))
    for i in range(4):
        driver.add(request(f"r{i}", 9, seed=i, max_tokens=30, ignore_eos=True))
    driver.turn()
    driver.begin()
    driver.abort("r2")
    driver.core.check()
    return driver


def add_foreign_block(state: EngineState) -> None:
    state.running[0].table.block_ids.append(state.running[1].table.block_ids[0])


DAMAGE: dict[str, Callable[[EngineState], object]] = {
    "out of order": lambda s: s.running.reverse(),
    "runs twice": lambda s: s.running.append(s.running[-1]),
    "not live": lambda s: s.live.pop("r0"),
    "a block too many": add_foreign_block,
    "a block too few": lambda s: s.running[0].table.block_ids.pop(),
    "a reference lost": lambda s: s.pool.release([s.running[0].table.block_ids[0]]),
    "plans miscounted": lambda s: setattr(s.running[0], "num_outstanding", 0),
    "planned too far": lambda s: setattr(s.running[0], "num_planned", s.running[0].num_planned + 1),
    "planned past the end": lambda s: setattr(s.running[0], "max_total", s.running[0].num_planned),
    "pending miscounted": lambda s: setattr(s, "pending_blocks", 0),
    "wrong state": lambda s: setattr(s.running[0], "state", SequenceState.PREEMPTED),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_the_check_notices(damage: Callable[[EngineState], object]) -> None:
    driver = engine_in_use()
    damage(driver.core._state)
    with pytest.raises(AssertionError):
        driver.core.check()
