"""How the silence of a rank is counted: ping by ping, and not while the one who listens stands still."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from ray.exceptions import RayError

from ellm.worker import rank_group
from ellm.worker.actor import RankStatus
from ellm.worker.rank_group import Member

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
