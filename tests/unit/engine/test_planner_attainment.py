"""The loop that keeps enough requests to their SLO."""

from __future__ import annotations

import pytest

from ellm.worker.engine.planner.attainment import SafetyFactor


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
