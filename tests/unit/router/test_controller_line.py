"""A router's line to the controller: a slow search is not lost, and one that hangs is replaced once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from ellm.router.controller_line import HUNG_S, START_S, TRIES, RayControllerLine
from ellm.worker.api.wire import Message


class Actor:
    """A handle whose calls answer with its name, or never."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.hangs = False
        self.exchange = SimpleNamespace(remote=self._exchange)

    async def _exchange(self, note: Message) -> Message:
        if self.hangs:
            await asyncio.Event().wait()
        return (self.name,)


async def ask(line: RayControllerLine, timeout_s: float = 1.0) -> Message | None:
    with contextlib.suppress(TimeoutError):
        return await asyncio.wait_for(line.exchange(()), timeout_s)
    return None


def test_a_search_that_outlasts_the_time_is_used_by_the_next_who_asks() -> None:
    go, searches = threading.Event(), []

    def find() -> Any:
        searches.append(1)
        go.wait(5)
        return Actor("a")

    async def test() -> None:
        line = RayControllerLine(find)
        assert await ask(line, 0.01) is None
        assert await ask(line, 0.01) is None
        go.set()
        await asyncio.sleep(0.1)  # it ends while nobody waits
        assert await ask(line) == ("a",)

    asyncio.run(test())
    assert len(searches) == 1


def test_a_search_that_fails_is_tried_again() -> None:
    found = [ConnectionError(), Actor("a")]

    def find() -> Any:
        if isinstance(result := found.pop(0), Exception):
            raise result
        return result

    async def test() -> None:
        line = RayControllerLine(find)
        with pytest.raises(ConnectionError):
            await ask(line)
        assert await ask(line) == ("a",)

    asyncio.run(test())


@pytest.mark.parametrize("answered", [True, False])
def test_one_that_hangs_is_ended_and_another_found(answered: bool, caplog: pytest.LogCaptureFixture) -> None:
    first, second, ended, now = Actor("first"), Actor("second"), [], [0.0]
    found = [first, second]
    limit_s = HUNG_S if answered else START_S

    async def test() -> None:
        line = RayControllerLine(lambda: found.pop(0), ended.append, lambda: now[0])
        first.hangs = not answered
        await ask(line, 0.05)
        first.hangs = True
        for _ in range(TRIES + 1):
            assert await ask(line, 0.01) is None
        now[0] += limit_s - 0.1
        assert await ask(line, 0.01) is None
        assert ended == []
        now[0] += 0.2
        assert await ask(line) == ("second",)
        assert await ask(line) == ("second",)

    with caplog.at_level(logging.WARNING):
        asyncio.run(test())
    assert ended == [first]
    assert len(caplog.records) == 1
