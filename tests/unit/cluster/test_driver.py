"""The controller's body: no note is lost between ticks, and an outage is said once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import pytest

from ellm.cluster.api import wire
from ellm.cluster.api.config import ControllerConfig, ModelScale
from ellm.cluster.api.view import RouterNote
from ellm.cluster.driver import Driver
from ellm.worker.api.channel import WorkerChannel


class Nobody:
    """A directory without workers."""

    async def refresh(self) -> Mapping[str, WorkerChannel]:
        return {}


class Terms:
    """Counts terms, or fails."""

    def __init__(self) -> None:
        self.away = False

    async def newest(self) -> int:
        if self.away:
            raise ConnectionError("the store is away")
        return 1


def driver(terms: Terms, *models: ModelScale) -> Driver:
    return Driver(Nobody(), ControllerConfig(), models, 1, terms.newest)


def test_notes_that_come_between_two_ticks_are_merged() -> None:
    async def test() -> tuple[bytes, ...]:
        body = driver(Terms())
        for seq, digests in ((1, (b"a",)), (2, (b"b",)), (3, ())):
            body.exchange(wire.pack_note(RouterNote("r0", seq, (), digests)))
        await body._tick()
        answer = body.exchange(wire.pack_note(RouterNote("r0", 4)))
        assert answer is not None
        return wire.unpack_guidance(answer).held_back

    assert asyncio.run(test()) == (b"a", b"b")


def test_a_store_of_terms_that_is_away_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        terms = Terms()
        body = driver(terms)
        for away in (True, True, True, False, True, True):
            terms.away = away
            await body._tick()
        assert not body.resigned.is_set()

    with caplog.at_level(logging.ERROR):
        asyncio.run(test())
    assert [record.message for record in caplog.records] == [
        "nobody says whether there is a newer controller"
    ] * 2


def test_targets_go_on_from_what_was_asked_for() -> None:
    body = driver(Terms(), ModelScale("fixed", 2, 2), ModelScale("elastic", 1, 8))
    assert body.targets == {"fixed": 2}
    body.adopt({"elastic": 5, "fixed": 7, "unknown": 1})
    assert body.targets == {"fixed": 2, "elastic": 5}
    body.adopt({"elastic": 1})
    assert body.targets["elastic"] == 5
