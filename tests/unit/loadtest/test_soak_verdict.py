"""A soak's judge sees a leak, and does not take noise or a warm-up for one."""

from __future__ import annotations

import math

import pytest

from ellm.loadtest.soak_verdict import MIB_SLACK, Sample, least_squares, trend, trends

TIMES = [5.0 * i for i in range(120)]  # ten minutes


def wave(i: int) -> float:
    return 3.0 * math.sin(i)


def test_a_slope_is_found_and_said_per_hour() -> None:
    leak = trend("memory", "MiB", TIMES, [500.0 + 0.1 * t + wave(i) for i, t in enumerate(TIMES)], MIB_SLACK)
    assert leak.per_hour == pytest.approx(360.0, rel=0.02)
    assert leak.after - leak.before == pytest.approx(20.0, abs=1.0)
    assert not leak.flat
    assert trend("memory", "MiB", TIMES, [500.0 + 0.01 * t for t in TIMES], MIB_SLACK).flat


def test_noise_a_warm_up_and_a_fall_are_flat() -> None:
    assert trend("m", "", TIMES, [100.0 + wave(i) for i in range(120)], MIB_SLACK).flat
    warm = [min(100.0, 3.0 * i) for i in range(120)]
    assert trend("m", "", TIMES, warm, MIB_SLACK).flat
    assert trend("m", "", TIMES, [500.0 - i for i in range(120)], MIB_SLACK).flat


def test_a_leak_of_handles_or_in_one_process_is_named() -> None:
    samples = [
        Sample(
            t, {"router": 50.0 + 0.05 * t, "worker": 900.0}, {"router": 80.0, "worker": 950.0},
            100 + i // 4, 12, 3, 100, 1, 0,
        )
        for i, t in enumerate(TIMES)
    ]  # fmt: skip
    steady = [(t, 50.0 + wave(i)) for i, t in enumerate(TIMES)]
    found = {one.name: one for one in trends(samples, steady, [(t, t) for t in TIMES])}
    assert [name for name, one in found.items() if not one.flat] == ["memory, router", "file handles", "TPOT"]
    assert found["processes"].after == 12


def test_pages_of_files_are_stated_and_not_judged() -> None:
    """Another program that runs the same file changes them."""
    samples = [
        Sample(t, {"raylet": 10.0}, {"raylet": 25.0 + 15.0 * (i > 80)}, 100, 12, 3, 100, 1, 0)
        for i, t in enumerate(TIMES)
    ]
    steady = [(t, 50.0) for t in TIMES]
    found = {one.name: one for one in trends(samples, steady, steady)}
    assert all(one.flat for one in found.values())
    assert found["memory, raylet"].resident == (25.0, pytest.approx(39.6, abs=0.2))
    assert found["memory, raylet"].after == 10.0
    assert found["TPOT"].resident is None


def test_the_slope_is_that_of_least_squares() -> None:
    assert least_squares([0.0, 1.0, 2.0], [1.0, 3.0, 5.0]) == pytest.approx(2.0)
    assert least_squares([1.0, 1.0], [1.0, 5.0]) == 0.0
    with pytest.raises(AssertionError, match="too few"):
        trend("m", "", [0.0], [1.0], 1.0)
