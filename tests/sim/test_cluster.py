"""The simulated cluster: everybody is served, by the real policies' choices, the same for the same seed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import inf

import pytest

from ellm.loadtest.sim.cluster import Cluster, ClusterRun
from ellm.loadtest.sim.cluster_metrics import figures
from ellm.loadtest.sim.cluster_setting import ClusterSetting, WorkerKind
from ellm.loadtest.sim.workload import SimRequest, with_arrivals
from ellm.router.policies import POLICIES, make_policy
from ellm.worker.api.errors import ConfigError

SETTING = ClusterSetting(
    model="llama3-8b",
    gpu="h100",
    workload="sharegpt",
    num_requests=60,
    rate=40.0,
    workers=(WorkerKind(), WorkerKind(), WorkerKind(memory=0.2), WorkerKind(speed=0.25)),
    num_routers=2,
    report_delay_s=0.1,
    ttft_slo_s=1.0,
)
# Ten conversations; each turn brings what was said before, 32 blocks of 16 tokens a stretch.
TURNS = with_arrivals(
    [
        SimRequest(0.0, 512 * (turn + 1), 20, 20, (0, *range(100 * talk, 100 * talk + turn)), 512)
        for turn in range(1, 7)
        for talk in range(1, 11)
    ],
    rate=4.0,
    cv=0.0,
    seed=1,
)


def short_requests(count: int, rate: float) -> list[SimRequest]:
    return with_arrivals([SimRequest(0.0, 600, 30, 60)] * count, rate, 1.7, seed=2)


def play(
    policy: str, requests: list[SimRequest], seed: int = 1, setting: ClusterSetting = SETTING
) -> tuple[Cluster, ClusterRun]:
    policies = [make_policy(policy, 10 * seed + n) for n in range(setting.num_routers)]
    cluster = Cluster(setting, requests, policies, seed)
    return cluster, cluster.run()


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_everybody_is_served_and_nothing_stays_in_flight(policy: str) -> None:
    requests = short_requests(60, 60.0)
    cluster, run = play(policy, requests)
    assert [len(times) for times in run.token_times] == [request.output_tokens for request in requests]
    assert all(times[0] > r.arrival_s for times, r in zip(run.token_times, requests, strict=True))
    assert sum(report.generation_tokens for report in run.reports) == 60 * 30
    assert sum(run.reasons.values()) == 60
    # Two more reports, and every router knows that all it sent was seen.
    for now in (1e4, 1e4 + 0.1):
        for number in range(4):
            cluster._hear(now, number, cluster._report(number, now))
    for router in cluster._routers:
        for view in router.views:
            assert (view.num_unseen, view.unseen_rows, view.unseen_tokens, view.num_requests) == (0, 0, 0, 0)


def test_the_same_seed_is_the_same_run() -> None:
    requests = short_requests(50, 60.0)
    runs = [play("headroom", requests, seed)[1] for seed in (1, 1, 2)]
    assert runs[0].token_times == runs[1].token_times
    assert runs[0].chosen == runs[1].chosen
    assert runs[0].chosen != runs[2].chosen


def test_a_slow_worker_gets_less_and_first_tokens_come_sooner() -> None:
    requests = short_requests(150, 60.0)
    of = {}
    for policy in ("headroom", "round-robin"):
        _, run = play(policy, requests)
        of[policy] = figures(SETTING, requests, run)
        counts = Counter(run.chosen)
        if policy == "headroom":
            assert counts[3] < 0.5 * counts[0]
    assert of["headroom"]["ttft_p99_s"] < 0.7 * of["round-robin"]["ttft_p99_s"]
    assert of["headroom"]["goodput_tok_s"] >= of["round-robin"]["goodput_tok_s"]


@pytest.mark.parametrize("policy", ["headroom", "prefix-affinity", "session"])
def test_turns_of_a_conversation_find_what_was_said(policy: str) -> None:
    cached = {}
    for name in (policy, "round-robin"):
        cached[name] = figures(SETTING, TURNS, play(name, TURNS)[1])["hit_share"]
    assert cached[policy] > cached["round-robin"] + 0.1
    _, run = play(policy, TURNS)
    if policy != "session":  # which does not look
        close = [
            abs(g - c) <= 0.25 * c + 16 for g, c in zip(run.guessed_tokens, run.cached_tokens, strict=True)
        ]
        assert sum(close) > 0.9 * len(close)


def test_reports_that_come_late_are_lived_with() -> None:
    requests = short_requests(100, 60.0)
    late = replace(SETTING, report_delay_s=1.0)
    soon, lost = (
        figures(setting, requests, play("headroom", requests, setting=setting)[1])
        for setting in (replace(SETTING, report_delay_s=0.0), late)
    )
    assert lost["ttft_mean_s"] < 3.0 * soon["ttft_mean_s"] + 0.1
    assert lost["fallbacks"] == 0


def test_the_real_controller_is_asked_and_followed() -> None:
    """Its weights reach every view; with them the default policy serves about as well as without."""
    requests = short_requests(100, 60.0)
    cluster, advised = play("headroom", requests)
    weights = {view.replica_id: view.weight for view in cluster._routers[0].views}
    assert weights["w3"] < 0.9 < weights["w0"]  # a quarter of the speed
    assert all(0.0 <= view.admit_tokens < inf for view in cluster._routers[1].views)
    alone = play("headroom", requests, setting=replace(SETTING, controller=False))
    assert {view.weight for view in alone[0]._routers[0].views} == {1.0}
    with_it, without = (figures(SETTING, requests, run) for run in (advised, alone[1]))
    assert with_it["goodput_tok_s"] > 0.95 * without["goodput_tok_s"]
    assert with_it["ttft_p99_s"] < 1.25 * without["ttft_p99_s"]


@pytest.mark.parametrize(
    "changes",
    [
        {"workers": ()},
        {"rate": 0.0},
        {"report_delay_s": -1.0},
        {"num_routers": 0},
        {"workers": (WorkerKind(memory=1e-9),)},
    ],
)
def test_what_cannot_be_simulated_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(SETTING, **changes).check()  # type: ignore[arg-type]
