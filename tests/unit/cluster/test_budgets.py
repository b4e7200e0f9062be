"""What is lent never exceeds the limit, whoever asks for how much."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ellm.cluster.api.view import RouterNote, TenantUse
from ellm.cluster.budgets import lend, shares

demands = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.floats(0, 1e6), min_size=1, max_size=9)


@given(st.floats(0, 1e6), demands)
def test_shares_add_up_to_the_limit_and_are_fair(limit: float, asked: dict[str, float]) -> None:
    given_ = shares(limit, asked)
    assert sum(given_.values()) == pytest.approx(limit, abs=1e-6)
    even = limit / len(asked)
    for router, share in given_.items():
        assert share >= min(asked[router], even) - 1e-6  # nobody is kept short for others' sake
    by_demand = sorted(asked, key=lambda router: asked[router])
    assert all(given_[a] <= given_[b] + 1e-6 for a, b in itertools.pairwise(by_demand))


def test_a_busy_router_gets_what_an_idle_one_does_not_ask_for() -> None:
    assert shares(10.0, {"busy": 100.0, "idle": 0.0}) == {"busy": 9.5, "idle": 0.5}
    assert shares(10.0, {"busy": 4.0, "idle": 0.0}) == {"busy": 6.75, "idle": 3.25}
    assert shares(10.0, {"one": 100.0, "other": 100.0}) == {"one": 5.0, "other": 5.0}


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
