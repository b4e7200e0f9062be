"""How the silence of a rank is counted: ping by ping, and not while the one who listens stands still."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError

from ellm.worker import rank_group
from ellm.worker.actor import RankStatus
from ellm.worker.api.config import WorkerConfig
from ellm.worker.rank_group import Member, RankGroup

STATUS = RankStatus(1, "ready", ("", 1.0))


class Handle:
    """The end of a rank's actor that `renew` is called on; `answer` is what it does."""

    def __init__(self, answer: Callable[[], Awaitable[RankStatus]]) -> None:
        self.renew = self
        self._answer = answer

    def remote(self) -> Awaitable[RankStatus]:
        return self._answer()


async def never() -> RankStatus:
    await asyncio.Event().wait()
    return STATUS


async def at_once() -> RankStatus:
    return STATUS


def ping(member: Member, times: int, pause_s: float = 0.0) -> float:
    """Seconds of silence after so many pings."""

    async def run() -> float:
        for _ in range(times):
            await member.ping(pause_s)
        return member.silent_s

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_group, "PING_TIMEOUT_S", 0.05)


def test_silence_adds_up_and_a_word_ends_it() -> None:
    member = Member(0, Handle(never), same_node=False)
    assert ping(member, 3) == pytest.approx(0.15, abs=0.01)
    assert member.status is None
    member.handle = Handle(at_once)
    assert ping(member, 1) == 0.0
    assert member.state == "ready"


def test_a_standstill_of_the_listener_counts_as_one_ping_at_most() -> None:
    member = Member(0, Handle(never), same_node=False)

    async def run() -> None:
        pinging = asyncio.create_task(member.ping(0.0))
        await asyncio.sleep(0.01)
        time.sleep(0.6)
        await pinging

    asyncio.run(run())
    assert 0.0 < member.silent_s <= 0.05


def test_what_fails_at_once_counts_as_long_as_the_pause_between_pings() -> None:
    async def fails() -> RankStatus:
        raise RayError("the network is away for a moment")

    member = Member(0, Handle(fails), same_node=False)
    begun = time.monotonic()
    assert ping(member, 2, pause_s=0.1) == pytest.approx(0.2)
    assert time.monotonic() - begun >= 0.2


class LoadingRank:
    """The actor of a rank, as far as a group that loads asks it. Once `frozen` it says nothing any more."""

    def __init__(self) -> None:
        self.frozen = False
        self.killed = False

    def options(self, **_: object) -> LoadingRank:
        return self

    def remote(self, *_: object) -> LoadingRank:
        return self

    def __getattr__(self, name: str) -> Any:
        answers: dict[str, Callable[[], Awaitable[object]]] = {
            "open": self._open, "load": never, "follow": never, "exist": never, "renew": self._renew,
        }  # fmt: skip
        return SimpleNamespace(remote=lambda *_: answers[name]())

    async def _open(self) -> tuple[int, int]:
        return 1, 2

    async def _renew(self) -> RankStatus:
        return await never() if self.frozen else RankStatus(1, "loading", ("weights", 0.5))


def group_of(
    monkeypatch: pytest.MonkeyPatch, ranks: list[LoadingRank], config: WorkerConfig
) -> Callable[[], RankGroup]:
    def kill(rank: LoadingRank, no_restart: bool) -> None:
        rank.killed = True

    monkeypatch.setattr(rank_group.ray.util, "get_current_placement_group", lambda: None)
    monkeypatch.setattr(rank_group.ray, "kill", kill)
    monkeypatch.setattr(rank_group, "rank_actor", lambda: ranks[0])
    monkeypatch.setattr(rank_group, "follower_actor", lambda: ranks[1])
    for name in ("PING_S", "CONFIRM_S", "LOOK_S", "REASON_S"):
        monkeypatch.setattr(rank_group, name, 0.02)
    monkeypatch.setattr(rank_group, "SILENCE_S", 0.3)
    return lambda: RankGroup(config, "w0", "e0", {})


def test_a_rank_that_freezes_while_it_loads_ends_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one waits for it, and nothing else would end that."""
    ranks = [LoadingRank(), LoadingRank()]
    make = group_of(monkeypatch, ranks, WorkerConfig(tensor_parallel_size=2))

    async def test() -> None:
        group = make()
        loading = asyncio.create_task(group.load())
        await asyncio.sleep(0.6)
        assert not loading.done()  # however long it takes: ranks that answer are left alone
        ranks[1].frozen = True
        with pytest.raises(RuntimeError, match="rank 1 has not answered"):
            await asyncio.wait_for(loading, 5)
        assert all(rank.killed for rank in ranks)

    asyncio.run(test())


def test_a_rank_that_was_never_heard_may_still_be_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [LoadingRank(), LoadingRank()]
    ranks[1].frozen = True
    make = group_of(monkeypatch, ranks, WorkerConfig(tensor_parallel_size=2))

    async def test() -> None:
        group = make()
        loading = asyncio.create_task(group.load())
        await asyncio.sleep(0.8)
        assert group.problem is None
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        await group.end()

    asyncio.run(test())


@pytest.mark.parametrize(("since_tick_s", "problem"), [(0.25, None), (0.5, "data path")])
def test_a_data_path_that_stands_still_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, since_tick_s: float, problem: str | None
) -> None:
    rank = LoadingRank()
    make = group_of(monkeypatch, [rank], WorkerConfig())

    async def renew() -> RankStatus:
        return RankStatus(1, "ready", ("", 1.0), since_tick_s=since_tick_s)

    monkeypatch.setattr(rank, "_renew", renew)

    async def test() -> None:
        group = make()
        await asyncio.sleep(0.1)
        found = await group.confirmed_problem()
        assert found is None if problem is None else problem in str(found)
        await group.end()

    asyncio.run(test())
