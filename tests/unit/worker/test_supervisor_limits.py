"""What a supervisor refuses before anything starts, and how long a worker that keeps failing waits."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.experimental import internal_kv

from ellm.worker import restart_pause
from ellm.worker.api.actor_name import actor_name, epoch_of, is_rank, rank_name, worker_id_of
from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.restart_pause import FREE, MAX_S, FailureCount, pause_s
from ellm.worker.supervisor import WorkerSupervisor, check_group, worker_application


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

    async def test() -> None:
        assert await FailureCount("w0:config").read() == 0
        for count in range(1, 6):
            await FailureCount("w0:config").failed()
            assert await FailureCount("w0:config").read() == count
        assert await FailureCount("w1:config").read() == await FailureCount("w0:another").read() == 0
        await FailureCount("w0:config").succeeded()
        assert await FailureCount("w0:config").read() == 0

    asyncio.run(test())


def test_a_store_that_is_away_holds_nobody_up_and_loses_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls block their thread; the event loop, on which ranks' leases are renewed, goes on."""
    back, puts = threading.Event(), list[bytes]()
    monkeypatch.setattr(restart_pause, "STORE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(internal_kv, "_internal_kv_get", lambda key: back.wait(10) and b"7")
    monkeypatch.setattr(internal_kv, "_internal_kv_put", lambda key, value, overwrite: puts.append(value))

    async def test() -> None:
        num_turns = 0

        async def turn() -> None:
            nonlocal num_turns
            while True:
                await asyncio.sleep(0.01)
                num_turns += 1

        turning = asyncio.create_task(turn())
        begun = time.monotonic()
        assert await FailureCount("w0:config").read() == 0
        await FailureCount("w0:config").failed()
        assert time.monotonic() - begun < 2.0
        assert num_turns >= 5
        turning.cancel()
        assert not puts  # 1 would say that there were none before
        back.set()
        await FailureCount("w0:config").failed()
        assert puts == [b"8"]

    asyncio.run(test())


class Group:
    """What a supervisor asks of its group."""

    def __init__(self, state: str, problem: str | None = None) -> None:
        self.state = state
        self.problem = problem
        self.calls: list[str] = []

    async def confirmed_problem(self) -> str | None:
        return self.problem

    async def drain(self, timeout_s: float) -> bool:
        self.calls.append("drain")
        return True

    async def end(self) -> None:
        self.calls.append("end")


def supervisor(group: Group) -> Any:
    async def failed() -> None:
        group.calls.append("failed")

    return SimpleNamespace(
        _group=group, _ended=False, _proven=False, _config=WorkerConfig(), epoch="e", worker_id="w0",
        _failures=SimpleNamespace(failed=failed),
    )  # fmt: skip


@pytest.mark.parametrize("state", ["ready", "draining"])
def test_a_drain_that_is_under_way_is_waited_for(state: str) -> None:
    group = Group(state)
    asyncio.run(WorkerSupervisor.__del__(supervisor(group)))
    assert group.calls == ["drain", "end"]


def test_what_is_not_well_is_not_drained() -> None:
    for group in (Group("loading"), Group("ready", "rank 1 is dead")):
        asyncio.run(WorkerSupervisor.__del__(supervisor(group)))
        assert group.calls == ["end"]


def test_an_ill_group_is_ended_before_anything_is_counted() -> None:
    group = Group("ready", "rank 1 is dead")
    ill = supervisor(group)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="rank 1 is dead"):
            asyncio.run(WorkerSupervisor.check_health(ill))
    assert group.calls == ["end", "failed", "end"]
