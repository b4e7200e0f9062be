"""Scrapes of several routers: they agree, and whoever dies, no counter is ever shown smaller than before."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ellm.cluster.api.guidance import Guidance
from ellm.cluster.counting import CounterDesk
from ellm.router import metrics_sharing
from ellm.router.guidance import GuidanceBook
from ellm.router.metrics import RouterMetrics
from ellm.router.metrics_sharing import Outlet, SharedMetrics
from ellm.worker.api.report import WorkerInfo, WorkerReport
from ellm.worker.api.wire import Message

INFO = WorkerInfo("w0", "e0", "m", "n", 1024, 16, 64, 1000, (0,), "cpu", "float32", True)
COUNTED = ('ellm_request_success_total{finished_reason="stop"}', "ellm_generation_tokens_total")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_sharing, "AGAIN_S", 0.0)


class Cluster:
    """A controller's desk and the routers that reach it. Time goes on with each look at the clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.term = self.words = 0
        self.desk: CounterDesk | None = None
        self.new_controller()

    def clock(self) -> float:
        self.now += 0.05
        return self.now

    def new_controller(self) -> None:
        self.term += 1
        self.desk = CounterDesk(self.term, 5.0, self.now)

    async def counters(self, message: Message) -> Message:
        if self.desk is None:
            raise LookupError("no controller")
        return self.desk.exchange(message, (), {"m": 2}, self.clock())

    def tell(self, router: SharedMetrics, num_routers: int) -> None:
        """The controller's word about how many there are."""
        self.words += 1
        guidance = Guidance(self.term, self.words, 5.0, num_routers)
        assert router._guidance.take(guidance, self.clock())

    def router(self, timelines: dict[str, bytes] | None = None, num_routers: int = 2) -> SharedMetrics:
        metrics = RouterMetrics("m", self.clock)
        admission = SimpleNamespace(num_inflight=3)
        service: Any = SimpleNamespace(
            model="m", metrics=metrics, dispatcher=SimpleNamespace(admission=admission)
        )
        known = timelines or {}
        return SharedMetrics([service], GuidanceBook(num_routers), Outlet(self), known.get, self.clock)


def metrics_of(router: SharedMetrics) -> RouterMetrics:
    return router._services[0].metrics


async def scraped(router: SharedMetrics) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families((await router.text()).decode()):
        for sample in family.samples:
            labels = ",".join(
                f'{k}="{v}"' for k, v in sorted(sample.labels.items()) if k not in ("model_name", "router")
            )
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def test_two_routers_agree() -> None:
    async def run() -> None:
        cluster = Cluster()
        one, two = cluster.router(), cluster.router()
        metrics_of(one).finished["stop"] += 2
        metrics_of(two).finished["stop"] += 3
        for router in (one, two):  # a worker's counts are not doubled by who sees them
            metrics_of(router).worker_report(INFO, WorkerReport(1, generation_tokens=40))
            metrics_of(router).worker_gone(INFO, "death")
        await two._try_exchange()
        for router in (one, two, one):
            found = await scraped(router)
            assert [found[name] for name in COUNTED] == [5, 40]
            assert found["ellm_workers_lost_total"] == 1
            assert found["ellm_metrics_complete"] == 1
            assert found["ellm_workers_wanted"] == 2
        assert found["ellm_routers"] == 2

    asyncio.run(run())


class Play:
    """Requests, scrapes, pushes, deaths of routers, workers and controllers in any order."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.cluster = Cluster()
        self.routers = [self.cluster.router() for _ in range(3)]
        self.shown = dict.fromkeys(COUNTED, 0.0)
        self.shown_by: SharedMetrics | None = None
        self.num_scrapes = self.tokens = self.epoch = 0

    async def step(self) -> None:
        acts = [self.request] * 6 + [self.report] * 4 + [self.push] * 4 + [self.scrape] * 6 + [self.die]
        await self.chance.choice(acts)(self.chance.choice(self.routers))

    async def request(self, router: SharedMetrics) -> None:
        metrics_of(router).finished["stop"] += 1

    async def report(self, router: SharedMetrics) -> None:
        self.tokens += self.chance.randrange(20)
        info = replace(INFO, epoch=f"e{self.epoch}")
        metrics_of(router).worker_report(info, WorkerReport(self.tokens, generation_tokens=self.tokens))
        if self.chance.random() < 0.1:
            metrics_of(router).worker_gone(info, "death")
            self.epoch, self.tokens = self.epoch + 1, 0

    async def push(self, router: SharedMetrics) -> None:
        await router._try_exchange()

    async def scrape(self, router: SharedMetrics) -> None:
        found = await scraped(router)
        assert found["ellm_metrics_complete"] == 1
        assert all(found[name] >= self.shown[name] for name in COUNTED), (found, self.shown)
        self.shown, self.shown_by = {name: found[name] for name in COUNTED}, router
        self.num_scrapes += 1

    async def die(self, router: SharedMetrics) -> None:
        if self.chance.random() < 0.5:
            self.routers[self.routers.index(router)] = self.cluster.router()
        elif self.shown_by is None or self.shown_by in self.routers:  # who knows what was shown last lives
            self.cluster.new_controller()
            for other in self.routers:  # each second
                await other._try_exchange()


@pytest.mark.parametrize("seed", range(12))
def test_nothing_runs_backwards(seed: int) -> None:
    async def run() -> None:
        play = Play(seed)
        for _ in range(100):
            await play.step()
        assert play.num_scrapes > 10

    asyncio.run(run())


def test_without_a_controller_no_counter_is_less_than_another_router_has_shown() -> None:
    async def run() -> None:
        cluster = Cluster()
        one, two = cluster.router(), cluster.router()
        metrics_of(two).finished["stop"] += 3
        await two._try_exchange()
        assert (await scraped(one))[COUNTED[0]] == 3
        cluster.desk = None
        metrics_of(one).finished["stop"] += 1
        for router in (one, two, cluster.router()):  # the last takes the place of one that died
            found = await scraped(router)
            bare = {name.partition("{")[0] for name in found}
            assert not [name for name in bare if name.endswith(("_total", "_count", "_sum", "_bucket"))]
            assert found["ellm_metrics_complete"] == 0
            assert found["ellm_router_inflight_requests"] == 3
        cluster.new_controller()
        found = await scraped(two)
        assert found["ellm_metrics_complete"] == 1
        assert found[COUNTED[0]] >= 3
        await one._try_exchange()
        assert (await scraped(two))[COUNTED[0]] == 4

    asyncio.run(run())


def test_the_only_router_shows_what_it_has_counted_once_it_knew_all() -> None:
    async def run() -> None:
        cluster = Cluster()
        lone = cluster.router(num_routers=1)
        cluster.desk = None
        metrics_of(lone).finished["stop"] += 1
        assert COUNTED[0] not in await scraped(lone)  # there may have been one before it
        cluster.new_controller()
        cluster.tell(lone, 1)
        assert (await scraped(lone))[COUNTED[0]] == 1
        cluster.desk = None
        metrics_of(lone).finished["stop"] += 1
        found = await scraped(lone)
        assert (found[COUNTED[0]], found["ellm_metrics_complete"]) == (2, 0)

    asyncio.run(run())


def test_one_that_is_left_alone_shows_no_less_than_the_other_had_shown() -> None:
    async def run() -> None:
        cluster = Cluster()
        left, other = cluster.router(num_routers=1), cluster.router(num_routers=1)
        for router in (left, other):  # each knew all while it was believed to be the only one
            assert (await scraped(router))["ellm_metrics_complete"] == 1
            cluster.tell(router, 1)
            await scraped(router)
            cluster.tell(router, 2)
            router._note_others()  # as it does each second
        metrics_of(other).finished["stop"] += 3
        assert (await scraped(other))[COUNTED[0]] == 3
        cluster.tell(left, 1)  # the other has died
        desk, cluster.desk = cluster.desk, None
        assert COUNTED[0] not in await scraped(left)
        cluster.desk = desk
        assert (await scraped(left))[COUNTED[0]] == 3
        cluster.desk = None
        assert (await scraped(left))[COUNTED[0]] == 3

    asyncio.run(run())


def test_one_that_has_just_come_does_not_take_itself_for_the_only_one() -> None:
    async def run() -> None:
        cluster = Cluster()
        first, second = cluster.router(num_routers=1), cluster.router(num_routers=1)
        cluster.tell(first, 1)
        for router in (first, second):
            await scraped(router)
        metrics_of(first).finished["stop"] += 3
        cluster.desk = None
        assert (await scraped(first))[COUNTED[0]] == 3
        assert COUNTED[0] not in await scraped(second)

    asyncio.run(run())


def test_a_request_is_found_wherever_it_was() -> None:
    async def run() -> None:
        cluster = Cluster()
        one, two = cluster.router(), cluster.router({"req-1": b"{}"})
        assert await two.find("req-1") == b"{}"
        asked = asyncio.create_task(one.find("req-1"))
        for _ in range(5):
            await asyncio.sleep(0)
        await two._try_exchange()
        assert await asked == b"{}"
        assert await one.find("req-2") is None

    asyncio.run(run())
