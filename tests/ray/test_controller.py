"""The controller on a real cluster: advice comes, goes with its process, and comes back; nobody waits for it.

Workers are simulated engines in real rank processes; the routers' ends are the product's own loops.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from support.cluster import deploy, local_cluster, simulated_config, wait_for, workers
from support.processes import children_named, process_alive
from support.routers import Router, run, until
from support.workers import request

from ellm.cluster.actor import ControllerActor, claim_term, find, find_or_start
from ellm.cluster.api.config import ControllerConfig, ModelScale
from ellm.router import controller_line
from ellm.router.config import RouterConfig
from ellm.router.controller_line import RayControllerLine
from ellm.router.dispatch import Dispatcher
from ellm.router.guidance import ANSWER_S, AWAY, LAPSED, PERIOD_S, GuidanceBook, GuidanceLoop
from ellm.router.metrics import RouterMetrics
from ellm.router.replicas import RayDirectory
from ellm.worker.api.actor_name import NAMESPACE

pytestmark = pytest.mark.ray

CONFIG = ControllerConfig(tick_s=0.2, valid_s=2.0)
MODELS = (ModelScale("simulated", 2, 2),)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_cluster():
        # A worker that is silent is ended later than the controller has to notice it.
        deploy(simulated_config(stall_s=30.0), num_workers=2)
        yield


@pytest.fixture(autouse=True)
def own_controller() -> Iterator[None]:
    """Each test makes its own: one of the test before would end whenever its owner is collected."""
    yield
    end_controller()


def end_controller() -> None:
    if (controller := find()) is not None:
        ray.kill(controller)
    wait_for(lambda: not controller_pids() and find() is None, 10)


class Advised:
    """What a router has to do with the controller: links to workers, and the loop that asks for advice."""

    def __init__(self) -> None:
        config = RouterConfig(refresh_s=0.2, heartbeat_s=0.2)
        self.dispatcher = Dispatcher(RayDirectory(), config, RouterMetrics("simulated", time.monotonic))
        self.book = GuidanceBook()
        self.line = RayControllerLine(partial(find_or_start, RayDirectory, CONFIG, MODELS))
        self.loop = GuidanceLoop(self.book, self.line, self.dispatcher.links.values)

    @property
    def follows(self) -> bool:
        return self.book.heard(time.monotonic()).seen and len(self.book._workers) == 2

    @property
    def term(self) -> int:
        return self.book.heard(time.monotonic()).term


@contextlib.asynccontextmanager
async def advised() -> AsyncIterator[Advised]:
    router = Advised()
    await router.dispatcher.start()
    router.loop.start()
    try:
        yield router
    finally:
        await router.loop.close()
        await router.dispatcher.close()


def controller_pids() -> list[int]:
    return children_named("ControllerActor")


async def lives(actor: Any) -> bool:
    try:
        await actor.describe.remote()
    except RayActorError:
        return False
    return True


def test_two_routers_share_one_controller_and_follow_it() -> None:
    async def test() -> None:
        async with advised() as one, advised() as other:
            await until(lambda: one.follows and other.follows, 20)
            await until(lambda: one.book.num_routers == 2, 10)
            assert len(controller_pids()) == 1
            for link in one.dispatcher.links.values():
                assert 0.5 < link.replica.weight < 1.5

    run(test)


def test_a_killed_controller_costs_nothing_and_comes_back() -> None:
    async def test() -> None:
        async with advised() as router:
            await until(lambda: router.follows, 20)
            term = router.term
            channel = (await workers(RayDirectory()))[0]
            client = Router(channel, "client")
            await client.submit(request("long", 800))  # 4 s
            await until(lambda: client.outputs)
            (pid,) = controller_pids()
            os.kill(pid, signal.SIGKILL)
            killed_at = time.monotonic()
            await until(lambda: not router.book.heard(time.monotonic()).seen or router.term > term, 10)
            await until(lambda: router.follows and router.term > term, 20)
            recovery_s = time.monotonic() - killed_at
            assert recovery_s < 15
            # One that is back before a question's time is up was not missed; else that is counted.
            missed = router.book.fallbacks[AWAY] + router.book.fallbacks[LAPSED]
            assert missed > 0 or recovery_s < PERIOD_S + ANSWER_S
            await until(lambda: client.finished() == {"long"}, 10)
            assert len(client.tokens("long")) == 800
            await client.close()

    run(test)


def test_a_controller_that_stands_still_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_line, "HUNG_S", 3.0)

    async def test() -> None:
        async with advised() as router:
            await until(lambda: router.follows, 20)
            term = router.term
            (pid,) = controller_pids()
            os.kill(pid, signal.SIGSTOP)
            try:
                await until(lambda: router.follows and router.term > term, 40)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            await until(lambda: pid not in controller_pids(), 20)

    run(test)


def test_of_two_controllers_the_later_one_stays() -> None:
    """The second has another name here: one name is one actor."""

    async def test() -> None:
        async with advised() as router:
            await until(lambda: router.follows, 20)
            first = (await find().describe.remote())["term"]
            rival = (
                ray.remote(ControllerActor)
                .options(name="rival", namespace=NAMESPACE, num_cpus=0)
                .remote(RayDirectory, CONFIG, MODELS)
            )
            assert (await rival.describe.remote())["term"] > first
            await until(lambda: router.term > first, 20)  # the first has ended, and was replaced
            assert (await find().describe.remote())["term"] == router.term
            deadline = time.monotonic() + 10
            while await lives(rival):  # and so did the rival
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)

    run(test)


@ray.remote(num_cpus=0)
class Owner:
    """A process that makes the controller, as a router does."""

    async def begin(self) -> tuple[int, int]:
        """Its own pid and the controller's."""
        self.handle = await asyncio.to_thread(find_or_start, RayDirectory, CONFIG, MODELS)
        return os.getpid(), (await self.handle.describe.remote())["pid"]


def test_the_controller_ends_with_its_owner_and_the_next_router_makes_another() -> None:
    owner = Owner.remote()
    owner_pid, pid = ray.get(owner.begin.remote())
    assert controller_pids() == [pid]
    os.kill(owner_pid, signal.SIGKILL)
    wait_for(lambda: not process_alive(pid), 10)

    async def test() -> None:
        async with advised() as router:
            await until(lambda: router.follows, 20)

    run(test)


def test_terms_only_rise() -> None:
    terms = [claim_term() for _ in range(3)]
    assert terms == sorted(set(terms))


def test_a_stopped_worker_gets_nothing_new_from_anybody() -> None:
    """SIGSTOP: the worker neither dies nor answers; the controller says so after a few silent seconds."""

    async def test() -> None:
        async with advised() as router:
            await until(lambda: router.follows, 20)
            victim = (await workers(RayDirectory()))[0].info
            os.kill(victim.rank_pids[0], signal.SIGSTOP)
            try:
                await until(
                    lambda: (
                        victim.epoch in router.book._workers
                        and router.book._workers[victim.epoch].weight == 0.0
                    ),
                    10,
                )
                assert router.book._workers[victim.epoch].state == "failed"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim.rank_pids[0], signal.SIGCONT)

    run(test)
