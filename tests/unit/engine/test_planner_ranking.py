"""Who should be resident, rows that cost nothing, and what a copy costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ellm.worker.engine.planner.link import LinkCost
from ellm.worker.engine.planner.ranking import Rank, Standing, by_arrival, in_order, rank, residents
from ellm.worker.engine.planner.slack import GUARD_S
from ellm.worker.engine.planner.spare_rows import WITHIN, spare_rows


def standing(index: int, **fields: object) -> Standing:
    defaults: dict[str, object] = {
        "priority": 0,
        "order": index,
        "resident": True,
        "started": True,
        "hopeless": False,
        "slack_s": 5.0,
        "num_blocks": 10,
    }
    return Standing(index, **(defaults | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"started": False, "slack_s": None}, Rank.URGENT),
        ({"slack_s": GUARD_S - 0.1}, Rank.URGENT),
        ({"slack_s": GUARD_S + 0.1}, Rank.RESIDENT),
        ({"slack_s": GUARD_S + 0.1, "resident": False}, Rank.AHEAD),
        ({"slack_s": -9.0, "hopeless": True, "since_s": 9.0}, Rank.HOPELESS),
        ({"slack_s": -9.0, "hopeless": True, "since_s": 1.0}, Rank.URGENT),  # its turn
        ({"slack_s": -9.0, "hopeless": True, "since_s": 9.0, "resident": False}, Rank.HOPELESS),
        ({"slack_s": -9.0, "hopeless": True, "since_s": 31.0, "resident": False}, Rank.URGENT),
        ({"slack_s": None}, Rank.RESIDENT),
    ],
)
def test_ranks(fields: dict[str, object], expected: Rank) -> None:
    assert rank(standing(0, **fields)) is expected


def order_of(*standings: Standing) -> list[int]:
    return [s.index for _, s in in_order(standings)]


def test_the_urgent_come_first_and_a_resident_has_a_second_of_advantage() -> None:
    assert order_of(standing(0), standing(1, slack_s=0.5), standing(2, resident=False, slack_s=0.0)) == [
        1,
        2,
        0,
    ]
    assert order_of(standing(1, slack_s=0.9), standing(2, resident=False, slack_s=-0.5)) == [2, 1]


def test_nobody_who_is_ahead_takes_the_place_of_a_resident() -> None:
    assert order_of(standing(0, slack_s=60.0), standing(1, slack_s=2.0, resident=False)) == [0, 1]


def test_of_two_who_are_ahead_the_one_the_host_holds_gives_way() -> None:
    assert order_of(standing(0, slack_s=4.0, saved=1.0), standing(1, slack_s=6.0, saved=0.1)) == [1, 0]


def test_priorities_go_first_within_a_rank() -> None:
    assert order_of(standing(0, priority=2, slack_s=2.0), standing(1, priority=1, slack_s=9.0)) == [1, 0]


def test_by_arrival_nobody_takes_the_place_of_one_who_came_before() -> None:
    """Whatever their slack, and be one the first to come paused."""
    standings = [
        standing(0, slack_s=9.0, resident=False),
        standing(1, slack_s=-1.0),
        standing(2, priority=-1),
    ]
    assert [s.index for _, s in by_arrival(standings)] == [2, 0, 1]


def test_one_that_does_not_fit_is_passed_over() -> None:
    order = in_order([standing(0, num_blocks=6), standing(1, num_blocks=6), standing(2, num_blocks=4)])
    assert [s.index for s in residents(order, 10, 9)] == [0, 2]
    assert [s.index for s in residents(order, 100, 2)] == [0, 1]


def test_in_turn_nobody_passes_one_that_does_not_fit() -> None:
    order = by_arrival([standing(0, num_blocks=6), standing(1, num_blocks=6), standing(2, num_blocks=4)])
    assert [s.index for s in residents(order, 10, 9, in_turn=True)] == [0]
    assert [s.index for s in residents(order, 12, 9, in_turn=True)] == [0, 1]
    assert [s.index for s in residents(order, 100, 2, in_turn=True)] == [0, 1]
    assert [s.index for s in residents(order, 5, 9, in_turn=True)] == [0], "somebody goes on"


@given(knee=st.integers(1, 5000), least=st.integers(0, 64), most=st.integers(0, 4096))
def test_spare_rows_end_where_a_step_gets_longer(knee: int, least: int, most: int) -> None:
    def step_s(more: int) -> float:
        return 1.0 + 0.01 * max(0, more - knee)

    rows = spare_rows(step_s, least, most)
    assert rows <= most
    assert rows >= min(least, most)
    if rows > least:
        assert step_s(rows) <= 1.03 + 1e-9
    if rows + max(least, WITHIN) < most:
        assert step_s(rows + max(least, WITHIN) + 1) > 1.03 - 1e-9


def test_rows_that_a_step_has_time_for() -> None:
    def step_s(more: int) -> float:
        return 0.02 + 0.0001 * more

    assert spare_rows(step_s, 8, 2048) == 8
    assert 300 - WITHIN < spare_rows(step_s, 8, 2048, 0.05) <= 300
    assert spare_rows(step_s, 8, 100, 0.05) == 100
    assert spare_rows(step_s, 8, 2048, 0.01) == 8  # it takes longer without any


def test_a_link_is_learnt_from_its_copies() -> None:
    link = LinkCost(1000)
    for _ in range(50):
        link.observe(4000, 0.002)
    assert link.block_s == pytest.approx(0.0005)
    assert link.blocks_in(0.01) == 20
    assert link.blocks_in(0.0) == 1
    link.observe(0, 1.0)
    assert link.block_s == pytest.approx(0.0005)
