"""The loop that keeps enough requests to their SLO."""

from __future__ import annotations

import pytest

from ellm.worker.engine.planner.attainment import Daring, SafetyFactor


def test_z_rises_fast_and_falls_slowly() -> None:
    factor = SafetyFactor()
    assert (factor.z, factor.attainment) == (1.0, 1.0)
    for _ in range(16 * 20):
        factor.finished(True)
    assert factor.z == 0.0
    for _ in range(15):
        factor.finished(False)
    assert factor.z == 0.0  # not yet
    for expected in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0):
        factor.finished(False)
        assert factor.z == expected
        for _ in range(15):
            factor.finished(False)
    assert factor.attainment == 0.0


def test_the_last_64_are_judged() -> None:
    factor = SafetyFactor()
    for i in range(16):
        factor.finished(i != 0)  # 15 of 16: below 0.965
    assert factor.z == 1.5
    for _ in range(16):
        factor.finished(True)  # 31 of 32 is above it
    assert factor.z == pytest.approx(1.4)
    for _ in range(48):
        factor.finished(True)
    assert factor.attainment == 1.0


def finish(daring: Daring, attained: bool, count: int, num_admitted: int = 10) -> None:
    for _ in range(count):
        daring.finished(attained, num_admitted)


def test_few_who_are_late_change_nothing_and_one_more_brings_care() -> None:
    daring = Daring()
    finish(daring, False, 2)
    finish(daring, True, 61)
    assert not daring.careful
    finish(daring, False, 1)  # the last 64 hold three of them
    assert daring.careful


def test_who_was_late_long_ago_is_forgotten() -> None:
    daring = Daring()
    for _ in range(8):
        finish(daring, False, 2)
        finish(daring, True, 64)
    assert not daring.careful


def test_each_time_of_care_is_longer_and_says_when_it_shows() -> None:
    """Those who were let in before it end first."""
    daring = Daring()
    for length in (64, 128, 256, 512, 1024, 1024):
        finish(daring, False, 3)
        assert daring.careful
        finish(daring, False, 9)
        assert not daring.settled
        finish(daring, True, 1)
        assert daring.settled
        finish(daring, True, length - 1)
        assert daring.careful
        finish(daring, True, 1)
        assert not daring.careful
        assert not daring.settled


def test_care_takes_a_margin_only_once_too_many_are_late_in_spite_of_it() -> None:
    daring = Daring()
    finish(daring, False, 3)
    finish(daring, False, 10)  # who was let in before
    assert daring.settled
    assert daring.z == 0.0
    finish(daring, False, 15)
    assert daring.z == 0.0
    finish(daring, False, 1)  # judged at every 16th
    assert daring.z == 0.5
    finish(daring, False, 16)
    assert daring.z == 1.0


def test_what_has_gone_well_for_long_counts_for_a_while() -> None:
    daring = Daring()
    for _ in range(8):
        finish(daring, False, 3)
        finish(daring, True, 10)
        while daring.careful:
            finish(daring, True, 1)
    finish(daring, False, 3)
    finish(daring, False, 10)
    finish(daring, False, 32)  # fewer than nine of ten in time
    assert daring.z == 0.0
