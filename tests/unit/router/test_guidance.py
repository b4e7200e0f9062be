"""Advice at a router: which counts, how long, what it changes, and that a router does as well without."""

from __future__ import annotations

import asyncio
import contextlib
from math import inf
from types import SimpleNamespace

import pytest
from support.router_server import EchoWorker, RouterServer, router_config, wait_until

from ellm.cluster.api import wire
from ellm.cluster.api.config import ControllerConfig
from ellm.cluster.api.guidance import Guidance, TenantBudget, WorkerGuidance
from ellm.cluster.driver import Driver
from ellm.router.failover import LEARNED_S, MAX_POISON, POISON_S, PoisonList
from ellm.router.guidance import AWAY, CHECK_S, LAPSED, GuidanceBook, GuidanceLoop, tag, users
from ellm.worker.api.errors import WorkerFailed
from ellm.worker.api.wire import Message


def advice(term: int, seq: int, weight: float = 0.5, **more: object) -> Guidance:
    workers = (WorkerGuidance("epoch0", weight, 1000), WorkerGuidance("epoch1", 0.0, -1, "draining"))
    return Guidance(term, seq, 5.0, 4, workers, **more)  # type: ignore[arg-type]


def test_only_newer_advice_counts() -> None:
    book = GuidanceBook()
    assert book.take(advice(2, 5), 0.0)
    assert not book.take(advice(2, 5), 0.1)
    assert not book.take(advice(2, 4), 0.1)
    assert not book.take(advice(1, 99), 0.1)  # of a former controller
    assert book.take(advice(3, 1), 0.1)
    assert book.heard(0.3).term == 3


def test_it_lapses_once_and_then_all_weigh_alike() -> None:
    book = GuidanceBook(num_routers=3)
    assert not book.check(0.0)
    book.take(advice(1, 1, budgets=(TenantBudget("k", 1.0, 2.0),), held_back=(b"p",)), 10.0)
    assert book.check(15.0)
    assert (book.budget("k"), book.held_back, book.num_routers) == (TenantBudget("k", 1.0, 2.0), (b"p",), 4)
    for now in (15.1, 16.0, 99.0):
        assert not book.check(now)
    assert book.fallbacks[LAPSED] == 1
    assert book.budget("k") is None
    assert book.held_back == ()
    assert not book.heard(99.0).seen
    assert book.take(advice(1, 2), 100.0)
    assert book.check(100.0)


class Scripted:
    """A controller's line that says what it is told, and fails when it is told nothing."""

    def __init__(self) -> None:
        self.says: Guidance | None = None
        self.notes: list[Message] = []

    async def exchange(self, note: Message) -> Message | None:
        self.notes.append(note)
        if self.says is None:
            raise ConnectionError("nobody is there")
        return wire.pack_guidance(self.says)


def test_what_policies_see_follows_it_and_forgets_it() -> None:
    with RouterServer([EchoWorker(0), EchoWorker(1)], router_config()) as server:
        dispatcher = server.service.dispatcher
        wait_until(lambda: len(dispatcher.ready_links) == 2)
        book, line, now = GuidanceBook(), Scripted(), [0.0]
        loop = GuidanceLoop(book, line, dispatcher.links.values, clock=lambda: now[0])

        def seen() -> list[tuple[float, float]]:
            links = sorted(dispatcher.links.values(), key=lambda link: link.info.epoch)
            return [(link.replica.weight, link.replica.admit_tokens) for link in links]

        async def ask() -> None:
            try:
                await loop._ask(line)
            except ConnectionError:
                book.fallbacks[AWAY] += 1
            book.check(now[0])
            book.apply(dispatcher.links.values())

        line.says = advice(1, 1)
        server.wait_for(ask())
        assert seen() == [(0.5, 250.0), (0.0, inf)]  # a fourth of what all routers may send
        line.says = None
        server.wait_for(ask())
        assert seen()[0][0] == 0.5  # young enough
        now[0] = 6.0
        server.wait_for(ask())
        assert seen() == [(1.0, inf), (1.0, inf)]
        assert wire.unpack_note(line.notes[2]).seq == 3
        with server.client() as client:
            body = {"prompt": "x", "max_tokens": 1}
            assert client.post("/v1/completions", json=body).status_code == 200


def test_prompts_that_kill_are_held_back_by_all_routers_while_that_is_said() -> None:
    here, there = PoisonList(), PoisonList()
    here.add((1, 2, 3), 0.0)
    news = here.own(0.0)
    assert here.own(POISON_S - 1) == news  # until it is held back no more
    assert here.own(POISON_S + 1) == ()
    there.learn(news, 0.0)
    assert there.own(0.0) == ()  # it is not passed on for ever

    def refused(now: float) -> bool:
        try:
            there.check((1, 2, 3), now)
        except WorkerFailed:
            return True
        return False

    assert refused(1.0)
    there.learn(news, 20.0)
    assert refused(20.0 + LEARNED_S - 1)
    assert not refused(20.0 + LEARNED_S + 1)


def test_a_note_that_is_lost_loses_no_prompt_and_one_models_do_not_stop_another() -> None:
    lists = {"a": PoisonList(), "b": PoisonList()}
    lists["a"].add((1, 2, 3), 0.0)
    line = Scripted()
    loop = GuidanceLoop(GuidanceBook(), line, tuple, prompts=lambda: lists, clock=lambda: 1.0)

    def said() -> tuple[bytes, ...]:
        with contextlib.suppress(ConnectionError):
            asyncio.run(loop._ask(line))
        return wire.unpack_note(line.notes[-1]).held_back

    first = said()
    assert len(first) == 1
    line.says = advice(1, 1, held_back=(tag("b") + lists["a"].own(0.0)[0][:8] + b"x" * 8, *first))
    assert said() == first
    lists["b"].check((1, 2, 3), 1.0)  # held back for a alone
    other = {"a": PoisonList(), "b": PoisonList()}
    asyncio.run(
        GuidanceLoop(GuidanceBook(), line, tuple, prompts=lambda: other, clock=lambda: 1.0)._ask(line)
    )
    with pytest.raises(WorkerFailed):
        other["a"].check((1, 2, 3), 1.0)
    other["b"].check((1, 2, 3), 1.0)
    for i in range(2 * MAX_POISON):
        lists["b"].add((i,), 1.0)
    assert len(said()) == MAX_POISON


class Link:
    """As much of a worker's line as advice touches."""

    def __init__(self, epoch: str) -> None:
        self.info = SimpleNamespace(epoch=epoch)
        self.replica = SimpleNamespace(weight=1.0, admit_tokens=inf)


def test_a_budget_is_handed_out_once_per_word() -> None:
    book, link, late = GuidanceBook(), Link("epoch0"), Link("epoch0")
    book.take(advice(1, 1), 0.0)
    book.apply([link])  # type: ignore[list-item]
    assert link.replica.admit_tokens == 250.0
    link.replica.admit_tokens = 10.0
    book.apply([link])  # type: ignore[list-item]
    assert link.replica.admit_tokens == 10.0
    book.take(advice(1, 2), 0.0)
    book.apply([late])  # type: ignore[list-item]
    assert late.replica.admit_tokens == 250.0
    book.check(99.0)
    book.apply([link])  # type: ignore[list-item]
    assert link.replica.admit_tokens == inf


def test_a_budget_is_shared_by_the_routers_that_use_the_worker() -> None:
    assert users(16, 0) == users(16, 64) == 16
    assert users(16, 256) == 2.0
    assert users(2, 1024) == 1.0


def test_a_controller_that_does_not_know_the_routers_yet_changes_their_number_not() -> None:
    book = GuidanceBook(num_routers=3)
    book.take(Guidance(1, 1, 5.0, 0), 0.0)
    assert book.num_routers == 3
    book.take(Guidance(1, 2, 5.0, 8), 0.0)
    book.take(Guidance(2, 1, 5.0, 0), 0.0)
    assert book.num_routers == 8


def test_advice_lapses_in_time_although_an_exchange_hangs() -> None:
    book, link, now = GuidanceBook(), Link("epoch0"), [0.0]

    class Hangs:
        async def exchange(self, note: Message) -> Message | None:
            await asyncio.Event().wait()
            return None

    async def test() -> None:
        loop = GuidanceLoop(book, Hangs(), lambda: [link], clock=lambda: now[0])  # type: ignore[list-item]
        book.take(advice(1, 1), 0.0)
        loop.start()
        await asyncio.sleep(CHECK_S + 0.1)
        assert link.replica.weight == 0.5
        now[0] = 5.1
        await asyncio.sleep(CHECK_S + 0.1)
        await loop.close()

    asyncio.run(test())
    assert (link.replica.weight, book.fallbacks[LAPSED], book.fallbacks[AWAY]) == (1.0, 1, 0)


def test_a_controllers_body_reads_real_workers_and_survives_broken_lines() -> None:
    """The driver beside the router, on the same workers: it keeps its leases and connects again."""
    with RouterServer([EchoWorker(0), EchoWorker(1)], router_config()) as server:
        config = ControllerConfig(tick_s=0.05, silent_s=1.0)

        async def test() -> None:
            async def newest() -> int:
                return 1

            driver = Driver(server.directory, config, (), 1, newest)
            await driver.start()

            def words() -> dict[str, WorkerGuidance]:
                note = (1, "note", "r0", 1, (), ())
                answer = driver.exchange(note)
                return {} if answer is None else {w.epoch: w for w in wire.unpack_guidance(answer).workers}

            async def until_weights(*weights: float) -> None:
                deadline = asyncio.get_running_loop().time() + 10
                while [word.weight for word in words().values()] != list(weights):
                    assert asyncio.get_running_loop().time() < deadline, words()
                    await asyncio.sleep(0.02)

            await until_weights(1.0, 1.0)
            front = server.workers[0].front
            for box in list(front._boxes.values()):
                front._drop(box)  # every line to it breaks
            await asyncio.sleep(0.2)
            await until_weights(1.0, 1.0)
            assert driver.epochs() == ["epoch0", "epoch1"]
            server.workers[1].front.begin_drain()
            await until_weights(1.0, 0.0)
            await driver.close()

        server.wait_for(test())
        assert all(worker.front.num_dropped == 0 for worker in server.workers)
