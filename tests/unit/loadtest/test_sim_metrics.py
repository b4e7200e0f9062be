"""The figures of a run, each by hand on a few requests."""

from __future__ import annotations

from array import array

import pytest

from ellm.loadtest.sim.device import Device
from ellm.loadtest.sim.metrics import bound_tok_s, capacity_tok_s, measure, measure_window, realised_load
from ellm.loadtest.sim.presets import find_gpu, find_model
from ellm.loadtest.sim.workload import SimRequest

A100 = Device(find_model("llama2-13b"), find_gpu("a100-80g"))


def times(*values: float) -> array[float]:
    return array("d", values)


def test_a_tiny_run_by_hand() -> None:
    arrivals = [1.0, 2.0]
    tokens = [times(1.5, 2.0, 2.5), times(6.0, 8.0)]
    figures = measure(arrivals, tokens, tpot_slo_s=0.5)
    assert figures.duration_s == 7.0
    assert figures.throughput_tok_s == pytest.approx(5 / 7)
    assert figures.goodput_tok_s == pytest.approx(3 / 7)  # the second takes 2 s per token
    assert figures.slo_attainment == 0.5
    assert figures.slo_attainment_strict == 1.0  # its token 1 may come at 6 + 0.5 * 5
    assert figures.goodput_strict_tok_s == pytest.approx(5 / 7)
    assert figures.ttft_mean_s == pytest.approx((0.5 + 4.0) / 2)
    assert figures.ttft_p50_s == pytest.approx(2.25)
    assert figures.ttft_p99_s == pytest.approx(0.5 + 0.99 * 3.5)
    assert figures.tpot_mean_s == pytest.approx((0.5 + 2.0) / 2)
    assert figures.tpot_p99_s == pytest.approx(0.5 + 0.99 * 1.5)
    assert figures.gap_p99_s == pytest.approx(0.5 + 0.98 * 1.5)  # of 0.5, 0.5, 2.0


def attains(tokens: array[float], slo: float, ttft_slo: float | None = None) -> tuple[bool, bool]:
    figures = measure([0.0], [tokens], slo, ttft_slo)
    return figures.slo_attainment == 1.0, figures.slo_attainment_strict == 1.0


def test_the_two_definitions_differ_where_they_should() -> None:
    # One stop in the middle that the rest makes up for: fine by the mean, late at a token.
    stop = times(1.0, *(1.0 + 6.0 + 0.1 * i for i in range(1, 15)))
    assert attains(stop, 1.0) == (True, False)
    # A little slow all the time, but within the four tokens of grace.
    slow = times(1.0, 3.0, 5.0)
    assert attains(slow, 1.0) == (False, True)
    assert attains(slow, 2.0) == (True, True)


def test_the_deadline_of_each_token() -> None:
    """Token i by first + SLO * (i + 4): just in time, and just too late."""
    assert attains(times(1.0, 6.0), 1.0)[1]
    assert not attains(times(1.0, 6.001), 1.0)[1]
    assert attains(times(1.0, 1.5, 7.0), 1.0)[1]
    assert not attains(times(1.0, 1.5, 7.001), 1.0)[1]


def test_a_late_first_token_counts_only_against_a_slo_for_it() -> None:
    assert attains(times(9.0, 9.1), 1.0) == (True, True)
    assert attains(times(9.0, 9.1), 1.0, ttft_slo=9.0) == (True, True)
    assert attains(times(9.0, 9.1), 1.0, ttft_slo=8.9) == (False, False)


def test_a_single_token_has_no_time_per_token() -> None:
    assert attains(times(5.0), 0.001) == (True, True)
    assert measure([0.0, 0.0], [times(5.0), times(1.0, 3.0)], 1.0).tpot_mean_s == 2.0


def test_the_window_leaves_out_the_first_tenth() -> None:
    arrivals = [float(i) for i in range(20)]
    tokens = [times(100.0, 200.0), times(1.5, 100.0)] + [times(i + 0.5, i + 1.0) for i in range(2, 20)]
    assert measure(arrivals, tokens, 1.0).slo_attainment == 0.9
    window = measure_window(arrivals, tokens, 1.0)
    assert window.slo_attainment == 1.0
    assert window.duration_s == 18.0
    assert window.throughput_tok_s == 2.0
    assert measure_window(arrivals[:1], tokens[:1], 1.0).throughput_tok_s == pytest.approx(2 / 200)


REQUESTS = [SimRequest(1.0, 100, 3, 10), SimRequest(4.0, 50, 2, 10)]


def test_the_bound_by_hand() -> None:
    """Contexts read: 101 + 102 + 103, and 51 + 52."""
    read = 306 + 103
    capacity = (72e9 - 2 * 13.016e9) / 819_200
    constant_s = 3e-3 + 2 * 13.016e9 / 1.75e12
    seconds = read / capacity * constant_s + read * 819_200 / 1.75e12
    assert bound_tok_s(REQUESTS, A100) == pytest.approx(5 / seconds)


def test_capacity_is_the_bound_until_places_run_out() -> None:
    bound = bound_tok_s(REQUESTS, A100)
    # 5 tokens in 409 / 56,118 steps: 686 rows in each, which arithmetic binds.
    assert capacity_tok_s(REQUESTS, A100, 1_000) < bound
    read_s, constant_s = 409 * A100.kv_token_s, 3e-3 + A100.weights_s
    assert capacity_tok_s(REQUESTS, A100, 2) == pytest.approx(5 / (2.5 * constant_s + read_s))
    long = [SimRequest(1.0, 1_000, 3, 10)]
    assert capacity_tok_s(long, A100, 256) == pytest.approx(bound_tok_s(long, A100))


def test_load_is_what_comes_over_what_can_be_done() -> None:
    assert realised_load(REQUESTS, 10.0) == pytest.approx(5 / 4 / 10)
