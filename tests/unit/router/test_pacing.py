"""The rule of a paced stream, on a clock of the test's own."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ellm.router.pacing import LEAD_S, RATE, PacedQueue

SLO_S = 0.1
STEP_S = RATE * SLO_S
Arrival = tuple[float, int, int]  # when, and which tokens [first, end)


def released(
    arrivals: list[Arrival], slo_s: float = SLO_S, hold_s: float = 1e6, hold_tokens: int = 10**9
) -> list[float]:
    """When each chunk goes, with a timer that fires exactly when the oldest is due."""
    queue: PacedQueue[int] = PacedQueue(arrivals[0][0], slo_s, hold_s, hold_tokens)
    times: dict[int, float] = {}

    def until(now: float) -> None:
        while (due_at := queue.due_at) is not None and due_at <= now:
            for number in queue.pop(due_at):
                times[number] = due_at

    for number, (now, first, end) in enumerate(arrivals):
        until(now)
        queue.push(number, first, end, now)
        for ready in queue.pop(now):
            times[ready] = now
        held_tokens = sum(arrivals[i][2] - arrivals[i][1] for i in range(number + 1) if i not in times)
        assert held_tokens <= min(hold_tokens, hold_s / (RATE * slo_s)) + max(e - f for _, f, e in arrivals)
    until(float("inf"))
    assert list(times) == sorted(times) == list(range(len(arrivals)))
    return [times[i] for i in range(len(arrivals))]


def steady(count: int, period_s: float, start: float = 0.0, first: int = 0) -> list[Arrival]:
    return [(start + i * period_s, first + i, first + i + 1) for i in range(count)]


def test_a_burst_flows_evenly_from_its_first_token_on() -> None:
    times = released(steady(50, 0.001))
    assert times[0] == 0.0
    assert times[1] == pytest.approx(STEP_S - LEAD_S)
    assert all(b - a == pytest.approx(STEP_S) for a, b in pairwise(times[1:]))


def test_a_pause_within_the_slack_is_not_seen() -> None:
    """Sixty tokens at full speed, a pause until just before the next is due, and the rest."""
    resumed_at = 60 * 0.97 * SLO_S  # where the planner's aim lies
    arrivals = steady(60, 0.01) + steady(60, 0.01, resumed_at, 60)
    unpaced = [b[0] - a[0] for a, b in pairwise(arrivals)]
    paced = [b - a for a, b in pairwise(released(arrivals))]
    assert max(unpaced) > 5.0
    assert max(paced) <= STEP_S + 1e-9


def test_a_token_that_is_late_goes_at_once_and_those_behind_it_catch_up() -> None:
    arrivals = [(0.0, 0, 1), (1.0, 1, 2), (1.01, 2, 3), (1.02, 10, 11), (1.03, 11, 12)]
    times = released(arrivals)
    assert times[:4] == [0.0, 1.0, 1.01, 1.02]
    assert times[4] == pytest.approx(11 * STEP_S - LEAD_S)


def test_the_end_of_the_output_changes_nothing() -> None:
    whole = released(steady(30, 0.001))
    assert released(steady(20, 0.001)) == whole[:20]


@pytest.mark.parametrize(("hold_s", "hold_tokens", "most"), [(1.0, 1000, 10), (1000.0, 10, 10)])
def test_what_is_held_is_bounded_and_keeps_its_distance(hold_s: float, hold_tokens: int, most: int) -> None:
    """Beyond the bound the stream flows as tokens come, so many tokens behind them; then the rest evenly."""
    period_s = 0.01
    arrivals = steady(100, period_s)
    times = released(arrivals, hold_s=hold_s, hold_tokens=hold_tokens)
    for number in range(60, 100 - most):
        assert times[number] == pytest.approx(arrivals[number + most][0], abs=2e-9)
    tail = times[100 - most - 1 :]
    assert all(b - a == pytest.approx(STEP_S) for a, b in pairwise(tail))
    assert times[-1] - arrivals[-1][0] <= most * STEP_S + 1e-9


def test_a_hold_shorter_than_a_token_holds_nothing() -> None:
    arrivals = steady(20, 0.01)
    assert released(arrivals, slo_s=30.0, hold_s=10.0) == [now for now, _, _ in arrivals]


def test_a_chunk_of_several_tokens_is_due_with_the_first() -> None:
    times = released([(0.0, 0, 1), (0.0, 1, 5), (0.0, 5, 6), (0.0, 6, 6)])
    assert times[1] == pytest.approx(STEP_S - LEAD_S)
    assert times[2] == pytest.approx(5 * STEP_S - LEAD_S)
    assert times[3] == times[2]  # without tokens: the end of what came before


def test_the_oldest_may_go_before_its_time() -> None:
    queue: PacedQueue[str] = PacedQueue(0.0, SLO_S, 100.0, 100)
    for index, name in enumerate("abcd"):
        queue.push(name, index, index + 1, 0.0)
    assert [*queue.pop(0.0)] == ["a"]
    assert queue.pop_oldest(0.0) == "b"
    assert queue.due_at == pytest.approx(STEP_S)
    assert [*queue.flush()] == ["c", "d"]
    assert queue.due_at is None
    assert len(queue) == 0


@given(
    st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(1, 5)), min_size=1, max_size=60),
    st.floats(0.001, 2.0),
    st.floats(0.0, 20.0),
    st.integers(0, 50),
)
def test_pacing_alone_never_makes_a_token_late(
    chunks: list[tuple[float, int]], slo_s: float, hold_s: float, hold_tokens: int
) -> None:
    arrivals: list[Arrival] = []
    now, end = 1000.0, 0
    for wait_s, count in chunks:
        now += wait_s * slo_s
        arrivals.append((now, end, end + count))
        end += count
    for (came_at, first, _), gone_at in zip(
        arrivals, released(arrivals, slo_s, hold_s, hold_tokens), strict=True
    ):
        assert came_at <= gone_at <= max(came_at, arrivals[0][0] + slo_s * first) + 1e-6
