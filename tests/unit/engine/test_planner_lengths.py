"""The posterior of output lengths: what it says before, during and after traffic."""

from __future__ import annotations

from itertools import pairwise
from math import exp
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ellm.worker.engine.planner.lengths import BIN, HORIZONS, OutputLengths

FAR = 1 << 30


def run_whole(lengths: OutputLengths, output: int, max_tokens: int = FAR) -> None:
    """A request from its start to its end, told as an engine tells it: bins while it runs, then the end."""
    ended = min(output, max_tokens)
    passed = max(0, (ended - 1) // BIN)
    for index in range(passed):
        lengths.passed(index)
    lengths.finished(ended, censored=output > max_tokens, num_passed=passed)


def test_before_any_traffic_it_is_the_prior() -> None:
    lengths = OutputLengths()
    for k in (0, 1, 500, 2000, 10_000):
        assert lengths.survival(k) == pytest.approx(exp(-k / 2000))
    assert lengths.expected_remaining(0, FAR) == pytest.approx(2000, rel=0.01)
    assert lengths.expected_remaining(5000, FAR) == pytest.approx(2000, rel=0.01)  # no memory
    assert lengths.expected_remaining(5000, 5100) == pytest.approx(97.5, rel=0.01)


def test_it_finds_a_known_distribution_whole_and_cut() -> None:
    """Lognormal lengths, sigma 0.8, mean 1,346, half of them cut at 1,000: the cut says nothing of the
    tail."""
    rng = Random(3)
    outputs = [max(1, round(rng.lognormvariate(6.885, 0.8))) for _ in range(4000)]
    lengths = OutputLengths(forgetting=1.0)
    for i, output in enumerate(outputs):
        run_whole(lengths, output, 1000 if i % 2 else FAR)
    for k in (0, 100, 640, 1300, 2600, 5000):
        true = sum(output > k for output in outputs) / len(outputs)
        assert lengths.survival(k) == pytest.approx(true, abs=0.02)
    alive = [output - 640 for output in outputs if output > 640]
    assert lengths.expected_remaining(640, FAR) == pytest.approx(sum(alive) / len(alive), rel=0.06)


def test_those_who_still_run_count() -> None:
    """Twenty short answers came back first; two hundred long ones have passed 1,600 tokens and gone on."""
    lengths = OutputLengths()
    for _ in range(20):
        run_whole(lengths, 30)
    believed = lengths.survival(1600)
    for index in range(50):
        for _ in range(200):
            lengths.passed(index)
    assert believed < 0.15
    assert lengths.survival(1600) > 0.85


def test_the_past_is_forgotten_and_the_scale_stays_small() -> None:
    lengths = OutputLengths()
    for _ in range(12_000):  # past a renormalisation
        run_whole(lengths, 40)
    assert lengths.survival(100) < 0.02
    for _ in range(2000):
        run_whole(lengths, 400)
    assert lengths.survival(100) > 0.95
    assert lengths.survival(500) < 0.02


def test_everybody_cut_at_the_same_place_ends_nowhere() -> None:
    lengths = OutputLengths()
    for _ in range(500):
        run_whole(lengths, FAR, 256)
    assert lengths.survival(255) > 0.99
    assert lengths.expected_remaining(0, 256) == pytest.approx(256, rel=0.01)


def test_an_end_before_the_first_token_says_nothing() -> None:
    lengths = OutputLengths()
    for _ in range(100):
        lengths.finished(0, censored=False)
    assert lengths.survival(32) == pytest.approx(exp(-32 / 2000))


def test_horizons_end_behind_max_tokens() -> None:
    """The first horizon at or behind the end stands for the last moment before it."""
    lengths = OutputLengths()
    for max_tokens in (100, 99, 1):
        assert lengths.conditional(100, max_tokens) == (0.0,) * len(HORIZONS)
    row = lengths.conditional(100, 300)
    assert [q > 0 for q in row] == [h <= 256 for h in HORIZONS]
    assert row[4] == pytest.approx(exp(-(299 - 96) / 2000))
    assert lengths.conditional(96, 300) is row  # one row for the bin
    assert lengths.conditional(96, 301) is not row


def test_what_hardly_ever_happens_is_left_out() -> None:
    lengths = OutputLengths()
    for _ in range(4000):
        run_whole(lengths, 40)
    row = lengths.conditional(0, FAR)
    assert row[1] > 0.99
    assert all(q == 0.0 or q >= 1e-3 for q in row)
    assert row[-1] == 0.0


events = st.lists(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000), st.booleans()), min_size=0, max_size=60
)


@settings(max_examples=60, deadline=None)
@given(events=events, asked=st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 6000)), max_size=8))
def test_it_is_always_a_distribution(
    events: list[tuple[int, int, bool]], asked: list[tuple[int, int]]
) -> None:
    lengths = OutputLengths()
    for output, max_tokens, still_runs in events:
        if still_runs:
            for index in range(output // BIN):
                lengths.passed(index)
        else:
            run_whole(lengths, output, max_tokens)
    values = [lengths.survival(k) for k in range(0, 8000, 17)]
    assert values[0] == 1.0
    assert all(0.0 < after <= before for before, after in pairwise(values))
    for g, more in asked:
        cap = g + more
        remaining = lengths.expected_remaining(g, cap)
        exact = sum(lengths.survival(k) for k in range(g, cap)) / lengths.survival(g)
        assert remaining == pytest.approx(max(1.0, exact), rel=1e-6)
        row = lengths.conditional(g, cap)
        assert list(row) == sorted(row, reverse=True)
        start = g - g % BIN
        before = -1
        for h, q in zip(HORIZONS, row, strict=True):
            expected = lengths.survival(min(start + h, cap - 1)) / lengths.survival(start)
            if start + before >= cap or expected < 1e-3:
                expected = 0.0
            assert q == pytest.approx(expected)
            before = h


@settings(max_examples=40, deadline=None)
@given(outputs=st.lists(st.integers(1, 2000), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_bins_told_early_or_late_come_to_the_same(outputs: list[int], seed: int) -> None:
    rng = Random(seed)
    early, late = OutputLengths(forgetting=1.0), OutputLengths(forgetting=1.0)
    for output in outputs:
        bins = (output - 1) // BIN
        told = rng.randint(0, bins)
        for index in range(told):
            early.passed(index)
        early.finished(output, censored=False, num_passed=told)
        late.finished(output, censored=False)
    for lengths in (early, late):  # enough news for both to look again
        for _ in range(4):
            lengths.finished(1, censored=False)
    assert [early.survival(k) for k in range(0, 2100, 50)] == pytest.approx(
        [late.survival(k) for k in range(0, 2100, 50)]
    )
