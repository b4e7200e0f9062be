"""Submit and abort are idempotent, and an abort is never lost for coming first."""

from __future__ import annotations

import pytest
from support.engine_driver import EngineDriver, request

from ellm.worker.engine import tombstones
from ellm.worker.engine.tombstones import TTL_S, Tombstones


def test_the_same_attempt_is_taken_once() -> None:
    driver = EngineDriver()
    assert driver.add(request("r", max_tokens=4))
    assert not driver.add(request("r", max_tokens=4))
    driver.turn()
    assert not driver.add(request("r", max_tokens=4))
    driver.run()
    assert len(driver.streams["r"]) == 4


def test_a_newer_attempt_replaces_an_older_one() -> None:
    driver = EngineDriver()
    driver.add(request("r", max_tokens=9, ignore_eos=True))
    for _ in range(3):
        driver.turn()
    head = tuple(driver.streams["r"])
    assert driver.add(request("r", max_tokens=9, ignore_eos=True, attempt=2, output_ids=head))
    assert not driver.add(request("r", max_tokens=9, attempt=1))
    driver.run()
    assert len(driver.streams["r"]) == 9
    assert all(output.attempt == 2 for output in driver.outputs["r"])


def test_an_abort_before_the_submit_kills_it() -> None:
    driver = EngineDriver()
    assert not driver.abort("r", 1)
    assert not driver.add(request("r", attempt=0))
    assert not driver.add(request("r", attempt=1))
    assert not driver.core.has_work
    assert driver.add(request("r", attempt=2))


def test_an_abort_of_an_old_attempt_spares_the_new_one() -> None:
    driver = EngineDriver()
    driver.add(request("r", attempt=3, max_tokens=5))
    assert not driver.abort("r", 2)
    driver.run()
    assert len(driver.streams["r"]) == 5


def test_an_abort_is_idempotent_and_final() -> None:
    driver = EngineDriver()
    driver.add(request("r", max_tokens=50, ignore_eos=True))
    driver.turn()
    assert driver.abort("r")
    assert not driver.abort("r")
    assert not driver.add(request("r", max_tokens=50))  # the submit, delivered a second time
    driver.run()
    assert len(driver.streams["r"]) == 1


@pytest.mark.parametrize("turns", [0, 1, 4])
def test_an_aborted_request_leaves_no_block(turns: int) -> None:
    """Waiting, in its prompt, and decoding."""
    driver = EngineDriver()
    driver.add(request("other", 8, seed=1, max_tokens=30, ignore_eos=True))
    driver.add(request("r", 40, max_tokens=30, ignore_eos=True))
    for _ in range(turns):
        driver.turn()
    driver.abort("r")
    driver.run()
    report = driver.core.report(driver.now)
    assert report.free_blocks + report.cached_blocks == report.num_blocks
    assert len(driver.streams["other"]) == 30


def test_tombstones_fade() -> None:
    stones = Tombstones()
    stones.put("r", 1, now=0.0)
    assert stones.covers("r", 1, TTL_S - 1)
    assert not stones.covers("r", 1, TTL_S + 1)
    stones.put("s", 1, now=TTL_S + 1)
    assert len(stones) == 1


def test_tombstones_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tombstones, "MAX_TOMBSTONES", 3)
    stones = Tombstones()
    for i in range(5):
        stones.put(str(i), 0, now=0.0)
    stones.put("2", 0, now=1.0)
    assert len(stones) == 3
    assert [stones.covers(str(i), 0, 1.0) for i in range(5)] == [False, False, True, True, True]


def test_a_tombstone_keeps_the_highest_attempt() -> None:
    stones = Tombstones()
    stones.put("r", 4, now=0.0)
    stones.put("r", 2, now=0.0)
    assert stones.covers("r", 4, 1.0)
