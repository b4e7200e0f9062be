"""How far ahead of its deadline a request is, and the share of steps it needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ellm.worker.engine.planner.slack import (
    GUARD_S,
    PAUSING,
    FullSpeed,
    duty,
    is_hopeless,
    mean_pause,
    seconds_per_token,
    slack,
    spent_share,
)


def test_slack_counts_down_to_the_next_token() -> None:
    per_token = seconds_per_token(0.1)
    assert per_token == pytest.approx(0.097)
    assert slack(10.0, per_token, 1, 10.0) == pytest.approx(0.097)
    assert slack(10.0, per_token, 100, 15.0) == pytest.approx(4.7)
    assert slack(10.0, per_token, 10, 15.0) < 0
    assert seconds_per_token(None) is None


def test_hopeless_is_late_even_at_full_speed() -> None:
    assert not is_hopeless(-1.0, 100, 0.05, 0.03)  # makes 2 s up
    assert is_hopeless(-1.0, 40, 0.05, 0.03)  # makes 0.8 s up
    assert is_hopeless(1.0, 1000, 0.05, 0.06)  # ahead now, and every step loses
    assert not is_hopeless(0.0, 0, 0.05, 0.06)


def test_duty_spends_a_quarter_of_what_is_beyond_the_guard() -> None:
    assert duty(0.0, 500, 0.1, 0.05) == pytest.approx(PAUSING * 0.5)  # a new request: Tf / D
    assert duty(GUARD_S, 500, 0.1, 0.05) == pytest.approx(PAUSING * 0.5)
    assert duty(GUARD_S + 200.0, 500, 0.1, 0.05) == pytest.approx(PAUSING * 0.25)
    assert duty(0.0, 500, 0.05, 0.1) == 1.0
    assert duty(100.0, 500, None, 0.05) == 1.0


def test_with_a_host_tier_a_loose_slo_spends_all_of_it() -> None:
    assert spent_share(0.1, 0.05, has_host=True) == 1.0
    assert spent_share(0.1, 0.05, has_host=False) == 0.25  # a pause costs a computation there
    assert spent_share(0.1, 0.0625, has_host=True) == 0.25  # what was spent could hardly be caught up
    assert 0.25 < spent_share(0.09, 0.05, has_host=True) < 1.0
    assert spent_share(0.1, 0.0, has_host=True) == 0.25  # nothing measured yet
    assert duty(GUARD_S + 50.0, 500, 0.1, 0.05, True) == pytest.approx(PAUSING * 0.25)


positive = st.floats(1e-3, 10.0)


@given(
    slack_s=st.floats(-100, 100), rem=st.floats(0, 1e5), per_token=positive, full=positive, host=st.booleans()
)
def test_duty_is_a_share_and_falls_with_slack(
    slack_s: float, rem: float, per_token: float, full: float, host: bool
) -> None:
    share = duty(slack_s, rem, per_token, full, host)
    assert 0.0 < share <= 1.0
    assert duty(slack_s + 1.0, rem, per_token, full, host) <= share
    assert duty(slack_s, rem, per_token, 2 * full, host) >= share


@given(
    beyond=st.floats(0, 500),
    rem=st.integers(1, 5000),
    per_token=positive,
    full=st.floats(0.05, 1.0),
    host=st.booleans(),
)
def test_at_that_duty_the_deadline_holds(
    beyond: float, rem: int, per_token: float, full: float, host: bool
) -> None:
    """`rem` tokens at 1 / duty steps each take no longer than they may, the slack included."""
    full *= per_token  # a full-speed step that can keep the pace
    slack_s = GUARD_S + beyond
    takes = rem * full / duty(slack_s, rem, per_token, full, host)
    assert takes <= rem * per_token + spent_share(per_token, full, host) * beyond + 1e-6


def test_full_speed_follows_what_is_measured() -> None:
    speed = FullSpeed()
    assert speed.seconds(0.04) == 0.04
    speed.observe(0.03, 10, 10)
    assert speed.seconds(0.04) == 0.04  # the memory is not full yet: the model knows better
    for _ in range(200):
        speed.observe(0.08, 5, 10)
    assert speed.step_s == pytest.approx(0.08, rel=0.01)
    assert speed.seconds(0.04) == pytest.approx(0.16, rel=0.01)
    for _ in range(200):
        speed.observe(0.08, 0, 10)
    assert speed.seconds(0.04) < 1.0  # nobody decodes: bounded
    speed.observe(1e9, 0, 0)  # nobody is there: says nothing
    assert speed.seconds(0.04) < 1.0


def test_a_pause_is_the_slack_beyond_the_guard_by_the_tokens_that_have_it() -> None:
    assert mean_pause([100, 300], [GUARD_S + 8.0, GUARD_S]) == 2.0
    assert mean_pause([100, 100, 200], [None, -5.0, GUARD_S + 4.0]) == 2.0  # debts do not shorten it
    assert mean_pause([], []) == 0.0
