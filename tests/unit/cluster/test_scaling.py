"""More workers under load, fewer when idle, and neither in a hurry nor to and fro."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reports import Fleet

from ellm.cluster import actor
from ellm.cluster.api.actions import Scale
from ellm.cluster.api.config import ControllerConfig, ModelScale, ScalingConfig
from ellm.cluster.controller import Controller
from ellm.deploy import autoscaling
from ellm.worker.api.actor_name import NAMESPACE

SCALING = ScalingConfig(up_after_s=2.0, down_after_s=10.0, cool_down_s=5.0)
CONFIG = ControllerConfig(tick_s=0.5, scaling=SCALING)


class Elastic:
    """A fleet that follows the target at once, and a brain."""

    def __init__(self, count: int, most: int = 8) -> None:
        self.fleet = Fleet(count)
        self.brain = Controller(CONFIG, 1, [ModelScale("m", 1, most)])
        self.brain.scalers["m"].adopt(count)
        self.now = 0.0
        self.targets: list[tuple[float, int]] = []

    def load(self, tokens: int, **report: object) -> None:
        for index in range(len(self.fleet.reports)):
            self.fleet.change(index, running_tokens=tokens // len(self.fleet.reports), **report)

    def run(self, seconds: float, tokens: int, **report: object) -> int:
        for _ in range(int(seconds / CONFIG.tick_s)):
            self.load(tokens, **report)
            self.now += CONFIG.tick_s
            for action in self.brain.tick(self.fleet.view(), self.now):
                if isinstance(action, Scale):
                    self.targets.append((self.now, action.num_workers))
                    self.follow(action.num_workers)
        return len(self.fleet.reports)

    def follow(self, target: int) -> None:
        fleet = self.fleet
        while len(fleet.reports) < target:
            fleet.reports.append(replace(fleet.reports[0], seq=1))
            fleet.epochs.append(f"new{self.now}-{len(fleet.reports)}")
        del fleet.reports[target:], fleet.epochs[target:]


def test_load_makes_it_grow_and_idleness_shrink_to_the_minimum() -> None:
    elastic = Elastic(1)
    assert elastic.run(6, 4000) == 1
    assert elastic.run(30, 40_000) == 4  # of 16,000 tokens each: doubled twice
    assert elastic.run(200, 0) == 1
    times = [at for at, _ in elastic.targets]
    assert all(later - sooner >= SCALING.cool_down_s for sooner, later in itertools.pairwise(times))


def test_it_never_leaves_its_bounds() -> None:
    assert Elastic(1, most=3).run(60, 10**6) == 3


def test_a_start_goes_on_from_what_was_asked_for() -> None:
    elastic = Elastic(3)
    elastic.run(30, 25_000)
    assert elastic.targets == []
    assert elastic.brain.scalers["m"].target == 3


def test_workers_that_load_are_counted_although_nobody_hears_them() -> None:
    """The target stays while nobody serves and while the first of several does."""
    elastic = Elastic(4)
    fleet, everyone = elastic.fleet, (list(elastic.fleet.reports), list(elastic.fleet.epochs))
    elastic.follow = lambda target: None  # type: ignore[method-assign]
    fleet.reports, fleet.epochs = [], []
    elastic.run(60, 0)
    assert (elastic.targets, elastic.brain.scalers["m"].target) == ([], 4)
    fleet.reports, fleet.epochs = everyone[0][:1], everyone[1][:1]
    elastic.run(60, 0)
    assert (elastic.targets, elastic.brain.scalers["m"].target) == ([], 4)
    fleet.reports, fleet.epochs = everyone
    elastic.run(30, 0)
    assert elastic.targets[0][1] == 3  # all have come, and they are idle


def test_nothing_is_decided_before_the_number_asked_for_is_known() -> None:
    elastic = Elastic(2)
    elastic.brain = Controller(CONFIG, 1, [ModelScale("m", 1, 8)])
    elastic.run(100, 0)
    assert elastic.targets == []
    assert Controller(CONFIG, 1, [ModelScale("m", 3, 3)]).scalers["m"].target == 3


def test_context_without_kv_counts_although_the_pool_looks_empty() -> None:
    elastic = Elastic(1)
    assert elastic.run(30, 20_000, headroom_tokens=12_000, uncached_token_ratio=0.7) > 1


def test_broken_promises_bring_one_more_only_under_load() -> None:
    assert Elastic(2).run(12, 18_000, slo_attainment=0.5) > 2
    assert Elastic(2).run(16, 14_000, slo_attainment=0.5) == 2


def test_it_does_not_ask_again_while_what_it_asked_for_is_loading() -> None:
    elastic = Elastic(2)
    elastic.follow = lambda target: None  # type: ignore[method-assign]
    elastic.run(60, 60_000)
    assert len(elastic.targets) == 1


def test_one_that_is_still_to_come_does_not_keep_a_surge_waiting() -> None:
    """Four serve, a fifth was asked for and is not there; what the four carry is too much for five."""
    elastic = Elastic(4)
    elastic.brain.scalers["m"].target = 5
    elastic.follow = lambda target: None  # type: ignore[method-assign]
    elastic.run(20, 4 * 16_000)
    assert elastic.targets == []
    elastic.run(20, 5 * 16_000)
    assert [target for _, target in elastic.targets] == [8]


def test_a_death_brings_no_more_than_the_one_that_replaces_it() -> None:
    """Four of a load of 0.75; the three that are left for a while are full, but four would not be."""
    elastic = Elastic(3)
    elastic.brain.scalers["m"].target = 4
    elastic.follow = lambda target: None  # type: ignore[method-assign]
    elastic.run(30, 3 * 16_000)
    assert elastic.targets == []


def test_what_never_came_is_given_up_when_it_is_not_needed() -> None:
    elastic = Elastic(2)
    elastic.follow = lambda target: None  # type: ignore[method-assign]
    elastic.run(20, 60_000)
    assert elastic.targets[-1][1] == 4
    elastic.run(200, 0)
    assert elastic.targets[-1][1] == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=40))
def test_under_any_load_it_stays_in_bounds_and_calm(loads: list[int]) -> None:
    elastic = Elastic(2)
    for tokens in loads:
        assert 1 <= elastic.run(3, tokens) <= 8
    times = [at for at, _ in elastic.targets]
    assert all(later - sooner >= SCALING.cool_down_s for sooner, later in itertools.pairwise(times))


@settings(max_examples=25, deadline=None)
@given(st.floats(0.0, 16_000 * 0.39))
def test_a_steady_load_is_answered_once(per_worker: float) -> None:
    """From any count: after it has settled, nothing changes any more."""
    elastic = Elastic(4)
    tokens = int(per_worker * 4)
    elastic.run(150, tokens)
    settled = list(elastic.targets)
    elastic.run(60, tokens)
    assert elastic.targets == settled


def test_serves_policy_tells_the_controller_what_there_is_and_finds_it_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, int]] = []
    targets = SimpleNamespace(remote=lambda current: asked.append(current) or {"m": 3})
    monkeypatch.setattr(autoscaling.ray, "get_actor", lambda *name: SimpleNamespace(targets=targets))
    monkeypatch.setattr(autoscaling.ray, "get", lambda answer, timeout: answer)
    policy = autoscaling.FollowController("m")
    context = SimpleNamespace(target_num_replicas=4)
    assert policy(context)[0] in (3, 4)
    assert policy._thread is not None
    policy._thread.join(5)
    assert (policy(context)[0], asked) == (3, [{"m": 4}])
    assert (actor.NAME, NAMESPACE) == autoscaling.CONTROLLER
