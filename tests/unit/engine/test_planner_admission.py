"""The three tests of admission: each one alone can say no, and none says no without its reason."""

from __future__ import annotations

from math import sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ellm.worker.engine.planner.admission import (
    Admission,
    Room,
    is_cheap,
    is_dear,
    restorable_tokens,
    timely_tokens,
)
from ellm.worker.engine.planner.lengths import HORIZONS, OutputLengths

FAR = 1 << 40
ALWAYS = (1.0,) * len(HORIZONS)
NOW = (1.0,) + (0.0,) * (len(HORIZONS) - 1)  # gone before the first horizon


def step_time(rows: float, kv_tokens: float) -> float:
    return 0.02 + 1e-4 * max(0.0, rows - 64) + 1e-6 * kv_tokens


def room_of(num_tokens: int = 10_000, num_host_tokens: int = 0) -> Room:
    return Room(num_tokens, num_host_tokens, step_time)


def plain(room: Room, *, z: float = 0.0, per_token_s: float | None = None) -> Admission:
    return Admission(room, z=z, per_token_s=per_token_s)


def fill(admission: Admission, num_tokens: int, duty: float, survival: tuple[float, ...]) -> int:
    """Admit alike requests until one is refused; how many went in."""
    count = 0
    while admission.admits(num_tokens, FAR, duty, survival):
        admission.add(num_tokens, FAR, duty, survival)
        count += 1
        assert count < 10_000
    return count


def test_growth_to_the_farthest_horizon_counts() -> None:
    assert fill(plain(room_of()), 400, 1.0, NOW) == 23  # 9,500 / 400
    assert fill(plain(room_of(30_000)), 400, 1.0, ALWAYS) == 3  # 28,500 / (400 + 8,192)


def test_a_share_of_the_steps_takes_a_share_of_the_memory() -> None:
    assert fill(plain(room_of(num_host_tokens=100_000)), 400, 0.5, NOW) == 47


def test_the_paused_need_a_place_too() -> None:
    assert fill(plain(room_of()), 400, 0.1, NOW) == 23
    assert fill(plain(room_of(num_host_tokens=10_000)), 400, 0.1, NOW) == 47


def test_what_is_computed_again_for_nothing_needs_no_place() -> None:
    room = Room(10_000, 0, step_time, num_restorable_tokens=2_000)
    assert fill(plain(room), 400, 0.1, NOW) == 28  # (9,500 + 2,000) / 400
    assert fill(plain(room), 400, 1.0, NOW) == 23  # of requests that cannot pause all are in memory


def test_restorable_is_what_spare_rows_compute_in_a_pause_less_the_queue() -> None:
    assert restorable_tokens(500.0, 4.0, 0.0) == 2_000
    assert restorable_tokens(500.0, 4.0, 1_500.0) == 500
    assert restorable_tokens(500.0, 4.0, 1e9) == 0  # a backlog that no burst is


def test_spread_is_kept_free_by_z() -> None:
    """Half are gone at the only horizon that binds: mean b f / 2 and variance b f^2 / 4, with f = 1,056."""
    most = {}
    for z in (0.0, 2.0):
        admission = Admission(room_of(200_000), z=z, per_token_s=None, horizons=(0, 1024))
        while admission.admits(32, FAR, 1.0, (1.0, 0.5)):
            admission.add(32, FAR, 1.0, (1.0, 0.5))
            most[z] = most.get(z, 0) + 1
    assert most[0.0] == 359  # 190,000 / 528
    b = most[2.0]
    assert 528 * (b + 2 * sqrt(b)) <= 190_000 < 528 * (b + 1 + 2 * sqrt(b + 1))


def test_memory_beyond_the_deadline_is_no_room() -> None:
    """0.985 * 0.024 s leave 3,640 tokens of the 10,000; rows are free up to 64."""
    room = room_of()
    assert timely_tokens(room, 0.985 * 0.024, 1.0) == pytest.approx(3640, abs=5)
    assert fill(plain(room, per_token_s=0.024), 100, 1.0, NOW) == 34  # 0.95 * 3,640 / 100
    assert plain(room, per_token_s=0.05).timely_tokens == 10_000


def test_rows_cost_time() -> None:
    """Short contexts, many rows: 0.02 s + 100 us for each row from the 65th on, within 0.985 * 0.05 s."""
    assert fill(plain(room_of(10**6), per_token_s=0.05), 1, 1.0, NOW) == 352


def test_without_a_deadline_time_refuses_nobody() -> None:
    assert fill(plain(room_of(2000)), 1, 1.0, NOW) == 1900


def test_a_tighter_candidate_tightens_the_tests() -> None:
    admission = plain(room_of(), per_token_s=0.05)
    for _ in range(50):
        admission.add(100, FAR, 1.0, NOW)
    assert admission.admits(100, FAR, 1.0, NOW)
    assert not admission.admits(100, FAR, 1.0, NOW, per_token_s=0.024)
    assert not admission.admits(100, FAR, 1.0, NOW)


def test_a_deadline_that_nobody_can_meet_turns_nobody_away() -> None:
    assert fill(plain(room_of(), per_token_s=0.01), 400, 1.0, NOW) == 23
    admission = plain(room_of(), per_token_s=0.05)
    assert admission.admits(400, FAR, 1.0, NOW, per_token_s=0.001)
    assert admission.timely_tokens == 10_000


def test_nobody_outgrows_its_max_tokens() -> None:
    """Requests of 400 that stop at 500: 0.95 * 10,000 hold 19 of them at their peak, wherever it falls."""
    admission, count = plain(room_of()), 0
    while admission.admits(400, 500, 1.0, ALWAYS):
        admission.add(400, 500, 1.0, ALWAYS)
        count += 1
    assert count == 19


def test_a_peak_between_two_horizons_is_seen() -> None:
    """All will be at 100 + 600, between the horizons 512 and 768, for certain."""
    lengths = OutputLengths()
    for _ in range(400):
        lengths.finished(600, censored=True)
    row = lengths.conditional(0, 600)
    admission, count = plain(room_of()), 0
    while admission.admits(100, 700, 1.0, row):
        admission.add(100, 700, 1.0, row)
        count += 1
    assert 13 <= count <= 14  # 9,500 / 700, and a few may end before


members = st.lists(
    st.tuples(st.integers(1, 3000), st.floats(0.05, 1.0), st.integers(0, 3000), st.integers(1, 4000)),
    max_size=30,
)


@settings(max_examples=100, deadline=None)
@given(members=members, z=st.floats(0, 3), per_token_s=st.none() | st.floats(0.021, 0.06))
def test_the_sums_are_those_of_the_formulas(
    members: list[tuple[int, float, int, int]], z: float, per_token_s: float | None
) -> None:
    lengths = OutputLengths()
    room = room_of(40_000, 10_000)
    admission = plain(room, z=z, per_token_s=per_token_s)
    rows = [(s, s + more, d, lengths.conditional(g, g + more)) for s, d, g, more in members]
    if rows[1:6]:
        admission.add_all(*zip(*rows[1:6], strict=True))
    for row in rows[6:]:
        admission.add(*row)
    fits = True
    limit_s = None if per_token_s is None else 0.985 * per_token_s
    timely = 40_000
    if limit_s is not None:
        timely = timely_tokens(room, limit_s, max(1.0, sum(d for _, _, d, _ in rows[1:])))
    for i, h in enumerate(HORIZONS):
        members_now = [(min(s + h, most), d, q[i]) for s, most, d, q in rows]
        mean = sum(d * q * f for f, d, q in members_now)
        variance = sum(d * q * f**2 * (d - d * q) for f, d, q in members_now)
        busy = sum(d * q for _, d, q in members_now)
        fits &= mean + z * sqrt(max(0.0, variance)) <= 0.95 * timely
        fits &= sum(q * f for f, _, q in members_now) <= 0.95 * 50_000
        fits &= limit_s is None or step_time(busy, mean) <= limit_s
    if rows:
        assert admission.admits(*rows[0]) is fits


@settings(max_examples=60, deadline=None)
@given(members=members, more=st.integers(0, 500), z=st.floats(0, 2.5))
def test_less_is_admitted_where_more_is(
    members: list[tuple[int, float, int, int]], more: int, z: float
) -> None:
    lengths = OutputLengths()
    for s, d, g, left in members:
        row = lengths.conditional(g, g + left)
        careful, bold = plain(room_of(), z=z + 0.5), plain(room_of(), z=z)
        for admission in (careful, bold):
            for _ in range(3):
                admission.add(s, s + left, d, row)
        if careful.admits(s + more, s + more + left, d, row):
            assert bold.admits(s, s + left, 0.9 * d, row)


def test_memory_is_cheap_where_all_of_it_can_be_computed_again_for_nothing() -> None:
    assert is_cheap(10_000.0, 10_000)
    assert not is_cheap(10_000.0, 10_001)
    assert not is_cheap(0.0, 256)  # no row is spare


def test_pauses_are_dear_where_fewer_rows_are_spare_than_are_put_out() -> None:
    assert is_dear(0.0, 80.0)
    assert is_dear(79.0, 80.0)
    assert not is_dear(80.0, 80.0)
