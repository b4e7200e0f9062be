"""What is lent never exceeds the limit, whoever asks for how much."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ellm.cluster.api.view import RouterNote, TenantUse
from ellm.cluster.budgets import lend, shares

demands = st.lists(st.floats(0, 1e6), min_size=1, max_size=9)


@given(st.floats(0, 1e6), demands)
def test_shares_add_up_to_the_limit_and_are_fair(limit: float, asked: list[float]) -> None:
    given_ = shares(limit, asked)
    assert sum(given_) == pytest.approx(limit, abs=1e-5)
    even = limit / len(asked)
    for demand, share in zip(asked, given_, strict=True):
        assert share >= min(demand, even) - 1e-5  # nobody is kept short for others' sake
        assert share >= 0.1 * even - 1e-5
    by_demand = [share for _, share in sorted(zip(asked, given_, strict=True))]
    assert all(less <= more + 1e-5 for less, more in pairwise(by_demand))


def test_a_busy_router_gets_what_an_idle_one_does_not_ask_for() -> None:
    assert shares(10.0, [100.0, 0.0]) == pytest.approx([9.5, 0.5])
    assert shares(10.0, [4.0, 0.0]) == pytest.approx([6.75, 3.25])
    assert shares(10.0, [100.0, 100.0]) == pytest.approx([5.0, 5.0])


def test_every_router_hears_of_every_key_in_use_and_the_tighter_limit_holds() -> None:
    notes = [
        RouterNote("r0", 1, (TenantUse("k", 10.0, None, 8.0, 0.0),)),
        RouterNote("r1", 1, (TenantUse("k", 6.0, None, 0.0, 0.0),)),
        RouterNote("r2", 1, (TenantUse("free", None, None, 9.0, 9.0),)),
    ]
    lent = lend(notes)
    assert set(lent) == {"r0", "r1", "r2"}
    assert [budget.tenant for budget in lent["r2"]] == ["k"]
    assert sum(budgets[0].requests for budgets in lent.values()) == pytest.approx(6.0)
    assert {budgets[0].tokens for budgets in lent.values()} == {-1.0}
