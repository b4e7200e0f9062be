"""What a supervisor refuses before anything starts, and how long a worker that keeps failing waits."""

from __future__ import annotations

import pytest
from ray.experimental import internal_kv

from ellm.worker.api.actor_name import actor_name, epoch_of, is_rank, rank_name, worker_id_of
from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.restart_pause import FREE, MAX_S, FailureCount, pause_s
from ellm.worker.supervisor import check_group, check_room, worker_application

NODES = [{"CPU": 8.0}, {"CPU": 64.0, "GPU": 4.0}, {"CPU": 64.0, "GPU": 8.0}]


def test_a_group_that_no_node_can_hold_is_refused_with_what_there_is() -> None:
    check_room(WorkerConfig(tensor_parallel_size=8), {"GPU": 1.0}, NODES)
    with pytest.raises(
        ConfigError, match=r"needs 16 GPU on one node, and the largest node .* has 8"
    ) as caught:
        check_room(WorkerConfig(tensor_parallel_size=16), {"GPU": 1.0}, NODES)
    assert caught.value.param == "worker.tensor_parallel_size"
    with pytest.raises(ConfigError, match=r"needs 1 GPU on one node, and the largest node .* has 0"):
        check_room(WorkerConfig(), {"GPU": 1.0}, NODES[:1])
    check_room(WorkerConfig(tensor_parallel_size=16), {"CPU": 0.5}, NODES[:1])
    check_room(WorkerConfig(tensor_parallel_size=16), {}, [])


def test_a_group_of_no_rank_or_without_a_place_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        check_group(WorkerConfig(tensor_parallel_size=0))
    with pytest.raises(ConfigError, match="needs resources"):
        worker_application(WorkerConfig(tensor_parallel_size=2), num_workers=1, rank_cpus=0)


def test_failures_in_a_row_pause_ever_longer() -> None:
    pauses = [pause_s(n) for n in range(40)]
    assert pauses[: FREE + 1] == [0.0] * (FREE + 1)
    assert pauses[FREE + 1 : FREE + 4] == [2.0, 4.0, 8.0]
    assert pauses == sorted(pauses)
    assert max(pauses) == MAX_S


def test_only_rank_0_has_a_name_that_routers_look_for() -> None:
    name = actor_name("org/model:tag", "w3", "abc")
    assert (epoch_of(name), epoch_of(name, "org/model:tag"), epoch_of(name, "org/model")) == (
        "abc",
        "abc",
        None,
    )
    assert worker_id_of(name) == "w3"
    follower = rank_name(2, name)
    assert epoch_of(follower) is worker_id_of(follower) is None
    assert is_rank(name)
    assert is_rank(follower)
    assert not is_rank("ellm-controller")


def test_failures_are_counted_over_incarnations_and_forgotten_after_a_success(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store: dict[bytes, bytes] = {}
    monkeypatch.setattr(internal_kv, "_internal_kv_get", store.get)
    monkeypatch.setattr(
        internal_kv, "_internal_kv_put", lambda key, value, overwrite: store.__setitem__(key, value)
    )
    assert FailureCount("w0:config").read() == 0
    assert [FailureCount("w0:config").failed() for _ in range(5)] == [1, 2, 3, 4, 5]
    assert FailureCount("w1:config").read() == FailureCount("w0:another").read() == 0
    FailureCount("w0:config").succeeded()
    assert FailureCount("w0:config").read() == 0
