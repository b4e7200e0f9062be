"""What `ellm plan` concludes from figures: each verdict from trials that are made up for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ellm.loadtest.sim import advice
from ellm.loadtest.sim.advice import PAYS, PAYS_NOT, Advice, advise, gains
from ellm.loadtest.sim.layouts import Sized, size_up
from ellm.loadtest.sim.setting import Setting
from ellm.loadtest.sim.trials import BASELINE, OURS, Trial

PLAIN = Trial(
    rate=1.0,
    load=0.9,
    policy=BASELINE,
    host_gb=0.0,
    throughput_tok_s=1_000.0,
    goodput_tok_s=900.0,
    slo_attainment=0.9,
    ttft_mean_s=1.0,
    ttft_p99_s=2.0,
    tpot_mean_s=0.05,
    preemptions=7.0,
    parks=0.0,
    recomputed_per_output_token=0.1,
)
ADAPTIVE = replace(PLAIN, policy=OURS)
HOSTED = replace(ADAPTIVE, host_gb=10.0)


@pytest.fixture(scope="module")
def plan() -> Sized:
    return size_up(Setting(tpot_slo_ms=100.0), [1, 2])


def conclude(
    monkeypatch: pytest.MonkeyPatch, plan: Sized, trials: list[Trial], rate: float | None = None
) -> dict[str, Advice]:
    """The advice that these trials lead to, by topic."""
    monkeypatch.setattr(advice, "run_trials", lambda *args, **kwargs: trials)
    host = max(trial.host_gb for trial in trials)
    given, found = advise(plan, [1.0], host, rate=rate)
    assert given is trials
    return {one.topic: one for one in found}


@pytest.mark.parametrize(
    ("goodput", "ttft_s", "better"),
    [
        (900.0, 1.0, False),
        (915.0, 1.0, False),  # less than 2 % is noise
        (919.0, 5.0, True),
        (900.0, 0.85, True),
        (900.0, 0.93, False),  # less than a tenth sooner
        (880.0, 0.1, False),  # sooner, and at the cost of goodput
        (890.0, 0.1, True),
    ],
)
def test_what_counts_as_a_gain(goodput: float, ttft_s: float, better: bool) -> None:
    assert gains(replace(ADAPTIVE, goodput_tok_s=goodput, ttft_mean_s=ttft_s), PLAIN) is better


def test_milliseconds_are_no_gain() -> None:
    assert not gains(replace(ADAPTIVE, ttft_mean_s=0.01), replace(PLAIN, ttft_mean_s=0.05))


def test_the_host_tier_pays(monkeypatch: pytest.MonkeyPatch, plan: Sized) -> None:
    found = conclude(monkeypatch, plan, [PLAIN, ADAPTIVE, replace(HOSTED, ttft_mean_s=0.1)])
    assert found["host tier"].verdict == PAYS
    assert "mean TTFT 1 -> 0.1 s" in found["host tier"].text
    assert found["adaptive policy"].verdict == PAYS_NOT
    assert found["what pays here"].verdict == "host tier"


def test_the_policy_alone_pays(monkeypatch: pytest.MonkeyPatch, plan: Sized) -> None:
    better = {"goodput_tok_s": 1_000.0, "slo_attainment": 1.0}
    found = conclude(monkeypatch, plan, [PLAIN, replace(ADAPTIVE, **better), replace(HOSTED, **better)])
    assert found["adaptive policy"].verdict == PAYS
    assert found["host tier"].verdict == PAYS_NOT
    assert "SLO 0.90 -> 1.00" in found["adaptive policy"].text


def test_better_here_and_worse_there_is_mixed(monkeypatch: pytest.MonkeyPatch, plan: Sized) -> None:
    there = replace(PLAIN, rate=2.0, load=1.8)
    trials = [
        PLAIN,
        replace(ADAPTIVE, goodput_tok_s=1_000.0),
        there,
        replace(there, policy=OURS, ttft_mean_s=3.0),
    ]
    assert conclude(monkeypatch, plan, trials)["adaptive policy"].verdict == "mixed"


def test_nothing_pays(monkeypatch: pytest.MonkeyPatch, plan: Sized) -> None:
    found = conclude(monkeypatch, plan, [PLAIN, ADAPTIVE, HOSTED])
    assert found["what pays here"] == Advice("what pays here", "neither", "full-chunked does as well here.")
    assert found["partial caching"].verdict == PAYS_NOT
    assert "56,112 tokens" not in found["partial caching"].text  # those of TP 2
    assert f"{plan.chosen.capacity_tokens:,} tokens" in found["partial caching"].text
    calm = [replace(trial, preemptions=0.0) for trial in (PLAIN, ADAPTIVE, HOSTED)]
    assert "Memory never ran short" in conclude(monkeypatch, plan, calm)["what pays here"].text


def test_without_a_host_tier_it_is_not_judged(monkeypatch: pytest.MonkeyPatch, plan: Sized) -> None:
    assert conclude(monkeypatch, plan, [PLAIN, ADAPTIVE])["host tier"].verdict == "not tried"


def test_partial_caching_pays_only_if_the_simulation_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    starved = size_up(Setting(model="qwen3-32b", tpot_slo_ms=100.0, kv_bytes=6e8), [1])
    assert (starved.prices.literal_may_pay, starved.prices.literal_with_link_may_pay) == (False, True)
    name = f"literal({starved.literal_ratio_with_link:.2f}, stream={starved.prices.stream_share:.2f})"
    more = replace(HOSTED, policy=name, throughput_tok_s=1_200.0, goodput_tok_s=1_100.0)
    found = conclude(monkeypatch, starved, [PLAIN, ADAPTIVE, HOSTED, more])
    assert found["partial caching"].verdict == PAYS
    assert "goodput 900 -> 1100 tok/s" in found["partial caching"].text
    less = replace(more, goodput_tok_s=800.0)
    assert (
        conclude(monkeypatch, starved, [PLAIN, ADAPTIVE, HOSTED, less])["partial caching"].verdict == PAYS_NOT
    )
    without = conclude(monkeypatch, starved, [PLAIN, ADAPTIVE])
    assert without["partial caching"].verdict == "not without a host tier"


def test_the_layout_says_how_many_replicas(monkeypatch: pytest.MonkeyPatch, plan: Sized) -> None:
    trials = [PLAIN, ADAPTIVE]
    capacity = plan.chosen.capacity_requests_s
    found = conclude(monkeypatch, plan, trials, rate=2.0 * capacity)["layout"]
    assert found.verdict == "TP 2"
    assert "against TP 1 1032" in found.text
    assert "3 replicas at a load of 0.9" in found.text
    assert "1 replica at" in conclude(monkeypatch, plan, trials, rate=0.5 * capacity)["layout"].text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_num_seqs": 8}, "Max_num_seqs 8 is what limits a step"),
        ({"tpot_slo_ms": 30.0}, "The SLO is what limits a step"),
        ({"num_requests": 100}, "Trials of 100 requests hardly fill a memory in which 46 run"),
        ({"ttft_slo_ms": 5.0}, "a TTFT of 5 ms is out of reach"),
        ({"workload": "leval"}, "longer than the KV pool of 56,112 tokens"),
    ],
)
def test_warnings(monkeypatch: pytest.MonkeyPatch, fields: dict[str, float], said: str) -> None:
    setting = replace(Setting(tpot_slo_ms=100.0), **fields)  # type: ignore[arg-type]
    assert said in conclude(monkeypatch, size_up(setting, [1]), [PLAIN, ADAPTIVE])["warning"].text


def test_no_warning_where_there_is_nothing_to_warn_of(monkeypatch: pytest.MonkeyPatch, plan: Sized) -> None:
    assert "warning" not in conclude(monkeypatch, plan, [PLAIN, ADAPTIVE])
