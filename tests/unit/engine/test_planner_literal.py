"""When recomputing part of every request in every step pays, and that it is never done where it does not."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ellm.worker.engine.planner.literal import GRID, best_ratio, may_pay, output_rate, step_towards

# Llama-2-13B on an A100: weights 26 GB at 1.75 TB/s, 101 microseconds a token recomputed, 33 on PCIe.
WEIGHTS_S, RECOMPUTE_S, LINK_S, READ_S = 0.0149, 101e-6, 33e-6, 0.47e-6


def step_time(rows: float, recompute: float, kv_tokens: float) -> float:
    return 0.003 + max(WEIGHTS_S, RECOMPUTE_S * (rows + recompute)) + READ_S * kv_tokens


def test_it_pays_in_a_starved_pool_only() -> None:
    assert not may_pay(55_000, 0.041, RECOMPUTE_S)
    assert not may_pay(55_000, 0.041, RECOMPUTE_S, LINK_S)
    assert may_pay(150, 0.018, RECOMPUTE_S)
    assert not may_pay(500, 0.018, RECOMPUTE_S)
    assert may_pay(500, 0.018, RECOMPUTE_S, LINK_S)  # the link carries the rest


@pytest.mark.parametrize(("num_tokens", "mean", "pays"), [(55_000, 1500, False), (100, 40, True)])
def test_the_grid_agrees_with_the_formula(num_tokens: int, mean: float, pays: bool) -> None:
    rate = partial(
        output_rate,
        num_tokens=num_tokens,
        mean_tokens=mean,
        num_wanted=10_000,
        step_time=step_time,
        limit_s=None,
    )
    assert (best_ratio(rate) > 0.0) is pays
    assert may_pay(num_tokens, step_time(num_tokens / mean, 0, num_tokens), RECOMPUTE_S) is pays
    if pays:
        assert rate(best_ratio(rate)) == max(rate(r) for r in GRID)


def test_nothing_is_left_uncached_without_demand_or_time() -> None:
    starved = partial(output_rate, num_tokens=100, mean_tokens=40, step_time=step_time)
    assert best_ratio(partial(starved, num_wanted=2, limit_s=None)) == 0.0  # two of 40 fit whole
    assert best_ratio(partial(starved, num_wanted=10, limit_s=0.017948)) == 0.0
    assert best_ratio(partial(starved, num_wanted=10, limit_s=0.0181)) > 0.5
    assert starved(0.5, num_wanted=10, limit_s=0.001) == 0.0


def test_a_small_gain_is_none() -> None:
    assert best_ratio(lambda r: 1.0 + 0.03 * r) == 0.0
    assert best_ratio(lambda r: 1.0 + 0.3 * r) == pytest.approx(0.6)
    assert best_ratio(lambda r: 0.0) == 0.0


@given(st.floats(0, 0.6), st.floats(0, 0.6))
def test_it_moves_by_bounded_steps_and_arrives(start: float, target: float) -> None:
    ratio, moves = start, 0
    while ratio != target:
        before = ratio
        ratio = step_towards(ratio, target)
        assert abs(ratio - before) <= 0.05 + 1e-12
        assert abs(ratio - target) < abs(before - target)
        moves += 1
    assert moves <= 13
