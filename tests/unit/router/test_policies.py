"""Who is chosen, and that a choice is fair where loads are equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from ellm.router.policies import POLICIES, Replica, RoutedRequest, RoutingPolicy, make_policy
from ellm.router.policies.power_of_two import PowerOfTwo
from ellm.worker.api.errors import ConfigError
from ellm.worker.api.report import WorkerReport

REQUEST = RoutedRequest((1, 2, 3))


def replica(name: str, running: int = 0, waiting: int = 0, unseen: int = 0) -> Replica:
    made = Replica(name)
    made.heard(WorkerReport(seq=1, num_running=running, num_waiting=waiting), "r", 0.0)
    made.place(unseen, 0, 0)
    return made


def chosen(policy: RoutingPolicy, replicas: Sequence[Replica]) -> str | None:
    choice = policy.choose(REQUEST, replicas, 0.1)
    return choice and choice.replica_id


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_chooses_one_of_those_there_are(name: str) -> None:
    policy = make_policy(name)
    assert chosen(policy, []) is None
    assert chosen(policy, [replica("a")]) == "a"
    counts = Counter(chosen(policy, [replica(x) for x in "abc"]) for _ in range(300))
    assert set(counts) == set("abc")
    assert min(counts.values()) > 60


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="nearest"):
        make_policy("nearest")


def test_least_requests_counts_what_is_on_its_way() -> None:
    policy = make_policy("least-requests")
    assert chosen(policy, [replica("a", 3), replica("b", 1, 1)]) == "b"
    assert chosen(policy, [replica("a", 3), replica("b", 1, 1, 5)]) == "a"


def test_round_robin_looks_at_no_load() -> None:
    policy = make_policy("round-robin")
    replicas = [replica("a", 100), replica("b")]
    assert {chosen(policy, replicas) for _ in range(2)} == {"a", "b"}


def test_power_of_two_never_takes_the_worst_of_two() -> None:
    policy = PowerOfTwo(seed=1)
    replicas = [replica("a", 9), replica("b", 1)]
    assert {chosen(policy, replicas) for _ in range(50)} == {"b"}
    counts = Counter(chosen(policy, [*replicas, replica("c", 5)]) for _ in range(300))
    assert counts["a"] == 0
    assert counts["b"] > counts["c"] > 0
