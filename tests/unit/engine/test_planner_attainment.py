"""The strict definition of attaining an SLO, and the loop that keeps enough requests to it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ellm.worker.engine.planner.attainment import Punctuality, SafetyFactor


def test_a_token_may_be_four_behind_and_no_more() -> None:
    request = Punctuality(0.1)
    request.emitted(0, 0.0, 7.0)
    request.emitted(1, 0.0, 7.5)
    assert not request.late
    request.emitted(2, 0.0, 7.601)
    assert request.late
    request.emitted(3, 0.0, 7.602)
    assert request.late  # for good


def test_the_first_token_has_its_own_deadline() -> None:
    for now, late in ((3.0, False), (3.1, True)):
        request = Punctuality(None, 2.0)
        request.emitted(0, 1.0, now)
        request.emitted(1, 1.0, 1000.0)
        assert request.late is late


def test_who_resumes_starts_on_time() -> None:
    request = Punctuality(0.1, 1.0)
    request.emitted(50, 0.0, 20.0)
    assert request.first_token_at == pytest.approx(15.0)
    request.emitted(51, 0.0, 20.4)
    assert not request.late
    request.emitted(52, 0.0, 20.7)
    assert request.late


@given(st.floats(0.01, 1.0), st.lists(st.floats(0, 2.0), min_size=1, max_size=50))
def test_late_is_the_definition(slo: float, gaps: list[float]) -> None:
    request = Punctuality(slo)
    now, times = 100.0, []
    for index, gap in enumerate([0.0, *gaps]):
        now += gap
        times.append(now)
        request.emitted(index, 0.0, now)
    assert request.late is any(t > times[0] + slo * (i + 4) for i, t in enumerate(times) if i)


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
