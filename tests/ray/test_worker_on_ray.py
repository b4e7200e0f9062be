"""A worker as it runs in a cluster: Serve replica, rank process, streams; and every way to lose a part of it.

The executor is simulated, everything else is what serves: Serve, the supervisor, the rank actor, the engine.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import ray
from ray import serve
from ray.util import list_named_actors
from support.cluster import APP, deploy, local_cluster, simulated_config, wait_for, workers
from support.processes import children_named, process_alive
from support.routers import Router, RouterProcess, run, until, until_replaced
from support.workers import bulky, request

from ellm.router.replicas import RayDirectory
from ellm.worker.api import wire
from ellm.worker.api.actor_name import NAMESPACE, actor_name, epoch_of
from ellm.worker.api.channel import ChannelClosed
from ellm.worker.api.config import ModelConfig, WorkerConfig
from ellm.worker.api.report import WorkerReport
from ellm.worker.api.request import EngineRequest
from ellm.worker.build import load_engine

pytestmark = pytest.mark.ray

CONFIG = simulated_config(stall_s=2.0)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_cluster():
        yield


@pytest.fixture(scope="module")
def pair(cluster: None) -> None:
    """Two workers. A test that loses one leaves two again."""
    deploy(CONFIG, num_workers=2)


@pytest.fixture
def single(cluster: None) -> Iterator[None]:
    """Whatever the test deploys takes the place of what was there, and is gone afterwards, ranks included."""
    yield
    pids = rank_pids()
    serve.delete(APP)
    wait_for(lambda: not any(map(process_alive, pids)), 15)


def rank_pids() -> list[int]:
    return children_named("RankActor")


def supervisor_pids() -> list[int]:
    return children_named("ServeReplica")


def blocks_free(report: WorkerReport) -> bool:
    return report.free_blocks + report.cached_blocks == report.num_blocks


def said_alone(req: EngineRequest, config: WorkerConfig) -> tuple[int, ...]:
    loaded = load_engine(config, lambda what, share: None)
    loaded.core.add_request(req, 0.0)
    tokens: list[int] = []
    while (plan := loaded.core.begin_step(0.0)) is not None:
        for output in loaded.core.finish_step(plan, loaded.executor.execute(plan), 0.0):
            tokens += output.token_ids
    return tuple(tokens)


def test_streams_carry_the_tokens_of_each_routers_requests(pair: None) -> None:
    async def test() -> None:
        directory = RayDirectory()
        found = await workers(directory)
        assert [c.info.worker_id for c in found] == ["w0", "w1"]
        assert {c.info.model for c in found} == {"simulated"}
        assert sorted(p for c in found for p in c.info.rank_pids) == sorted(rank_pids())
        again = await workers(directory)
        assert all(one is other for one, other in zip(found, again, strict=True))
        # Each router has channels of its own.
        routers = [Router(c, "r0") for c in found]
        routers += [Router(c, "r1") for c in await workers(RayDirectory())]
        mine = [[request(f"{i}-{j}", 30 + j, prompt_len=10 + j) for j in range(8)] for i in range(4)]
        for router, requests in zip(routers, mine, strict=True):
            await router.submit(*requests)
        await until(lambda: all(len(r.finished()) == 8 for r in routers), 20)
        for router, requests in zip(routers, mine, strict=True):
            assert router.finished() == {r.request_id for r in requests}
            assert router.tokens(requests[3].request_id) == said_alone(requests[3], CONFIG)
            assert router.reports[-1].state == "ready"
        for router in routers:
            await router.close()

    run(test)


def test_a_killed_rank_closes_its_streams_at_once_and_its_group_comes_back(pair: None) -> None:
    async def test() -> None:
        directory = RayDirectory()
        victim, other = await workers(directory)
        hit, spared = Router(victim), Router(other)
        await hit.submit(request("a", 2000))
        await spared.submit(request("b", 400))
        await until(lambda: hit.outputs and spared.outputs)
        pid = victim.info.rank_pids[0]
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: hit.closed_at is not None)
        assert hit.closed_at is not None
        assert hit.closed_at - killed_at < 1.0
        with pytest.raises(ChannelClosed):
            await hit.submit(request("late"))
        new = await until_replaced(directory, {victim.info.epoch}, 2)
        assert other.info.epoch in {c.info.epoch for c in new}
        assert not process_alive(pid)
        assert len(rank_pids()) == 2
        fresh = Router(next(c for c in new if c.info.epoch != other.info.epoch))
        await fresh.submit(request("c", 10))
        await until(lambda: fresh.finished() == {"c"} and spared.finished() == {"b"}, 10)
        for router in (hit, spared, fresh):
            await router.close()

    run(test)


def test_a_frozen_rank_is_replaced_and_does_not_live_on(pair: None) -> None:
    async def test() -> None:
        directory = RayDirectory()
        victim, _ = await workers(directory)
        os.kill(victim.info.rank_pids[0], signal.SIGSTOP)
        await until_replaced(directory, {victim.info.epoch}, 2)
        assert not process_alive(victim.info.rank_pids[0])

    run(test)


def test_a_supervisor_that_stood_still_does_not_take_its_old_reading_for_the_ranks_silence(
    pair: None,
) -> None:
    async def test() -> None:
        directory = RayDirectory()
        before = await workers(directory)
        router = Router(before[0])
        await router.submit(request("a", 1500))  # 7.5 s
        await until(lambda: router.outputs)
        frozen = supervisor_pids()
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(1.5 * CONFIG.stall_s)
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
        await until(lambda: router.finished() == {"a"}, 20)
        assert [c.info.epoch for c in await workers(directory)] == [c.info.epoch for c in before]
        assert all(process_alive(c.info.rank_pids[0]) for c in before)
        await router.close()

    run(test)


def test_a_machine_that_stood_still_loses_no_worker(pair: None) -> None:
    """Supervisors and ranks alike: their clocks say that no step was finished for too long."""

    async def test() -> None:
        directory = RayDirectory()
        before = await workers(directory)
        router = Router(before[0])
        await router.submit(request("still-a", 1500))  # 7.5 s
        await until(lambda: router.outputs)
        frozen = supervisor_pids() + rank_pids()
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(2 * CONFIG.stall_s)
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(CONFIG.stall_s + 1.0)
        assert [c.info.epoch for c in await workers(directory)] == [c.info.epoch for c in before]
        await router.close()
        again = Router((await workers(RayDirectory()))[0], "again")
        await again.submit(request("still-b", 20))
        await until(lambda: again.finished() == {"still-b"})
        await until(lambda: again.reports[-1].num_running == 0)  # what nobody reads was dropped
        await again.close()

    run(test)


def test_a_killed_supervisor_takes_its_rank_along(pair: None) -> None:
    async def test() -> None:
        directory = RayDirectory()
        before = {c.info.rank_pids[0]: c.info.epoch for c in await workers(directory)}
        os.kill(supervisor_pids()[0], signal.SIGKILL)
        await until(lambda: not all(map(process_alive, before)), 3)
        (gone,) = (pid for pid in before if not process_alive(pid))
        await until_replaced(directory, {before[gone]}, 2)

    run(test)


def test_requests_of_a_killed_router_end_within_its_lease(pair: None) -> None:
    async def test() -> None:
        channel = (await workers(RayDirectory()))[0]
        watcher = Router(channel, "watcher")
        doomed = RouterProcess.remote()
        pid = await doomed.begin.remote(20)
        await until(lambda: watcher.reports and watcher.reports[-1].num_running == 20)
        os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
        await until(lambda: watcher.reports[-1].num_running == 0)
        assert time.monotonic() - killed_at < 1.5  # sooner than its lease
        await until(lambda: blocks_free(watcher.reports[-1]), 1.0)  # once the last plan has come back
        rank = ray.get_actor(
            actor_name(channel.info.model, channel.info.worker_id, channel.info.epoch), NAMESPACE
        )
        assert (await rank.renew.remote()).num_live == 0
        deadline = time.monotonic() + 5
        while (await rank.renew.remote()).num_streams > 1:  # the dead router's generator ends too
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        await watcher.submit(request("y", 10))
        await until(lambda: watcher.finished() == {"y"})
        await watcher.close()

    run(test)


def test_a_router_that_stops_reading_is_cut_off(pair: None) -> None:
    async def test() -> None:
        channel = (await workers(RayDirectory()))[0]
        watcher = Router(channel, "watcher")
        stuck = (await workers(RayDirectory()))[0]
        stream = stuck.outputs("stuck")
        await anext(stream)
        await stuck.submit(wire.submit("stuck", 0, [bulky("x", 3500)]))
        await until(lambda: watcher.reports and watcher.reports[-1].num_running == 1)
        for _ in range(400):  # it lives, only its stream is stuck
            await stuck.abort(wire.abort("stuck", 0, []))
            await asyncio.sleep(0.03)
            if watcher.reports[-1].num_running == 0:
                break
        assert watcher.reports[-1].num_running == 0
        with pytest.raises(ChannelClosed):
            async for _ in stream:
                pass
        await watcher.close()

    run(test)


def test_an_engine_that_makes_no_step_is_replaced(single: None) -> None:
    deploy(simulated_config(step_s=6.0, stall_s=1.5))

    async def test() -> None:
        directory = RayDirectory()
        (victim,) = await workers(directory)
        router = Router(victim)
        await router.submit(request("a", 3))
        await until(lambda: router.closed_at is not None, 15)
        assert max(r.since_last_step_s for r in router.reports) > 1.4
        await until_replaced(directory, {victim.info.epoch}, 1)
        await router.close()

    run(test)


def test_a_worker_that_is_taken_down_drains(single: None) -> None:
    deploy(CONFIG)

    async def test() -> None:
        (channel,) = await workers(RayDirectory())
        pid = channel.info.rank_pids[0]
        router = Router(channel)
        await router.submit(request("a", 500))  # 2.5 s
        await until(lambda: router.outputs)
        deleting = asyncio.create_task(asyncio.to_thread(serve.delete, APP))
        await until(lambda: router.reports and router.reports[-1].state == "draining")
        assert router.finished() == set()
        await router.submit(request("late", 10))
        await until(lambda: "late" in router.finished())
        late = next(o for o in router.outputs if o.request_id == "late")
        assert late.error is not None
        assert late.error[0] == "unavailable"
        await until(lambda: router.closed_at is not None, 15)
        assert router.tokens("a") == said_alone(request("a", 500), CONFIG)
        await deleting
        await until(lambda: not process_alive(pid))
        await router.close()

    run(test)


def test_a_worker_that_still_loads_shows_its_progress_and_can_be_taken_down(
    single: None,
) -> None:
    serve.delete(APP)
    slow = replace(CONFIG, model=ModelConfig(path="simulated:load_s=60"))
    deploy(slow, wait=False)

    async def test() -> None:
        names: list[str] = []
        while not names:
            names = [a["name"] for a in list_named_actors(all_namespaces=True) if epoch_of(a["name"])]
            await asyncio.sleep(0.1)
        rank = ray.get_actor(names[0], NAMESPACE)
        shares = set()
        while len(shares) < 2:
            status = await rank.renew.remote()
            assert status.state == "loading"
            shares.add(status.progress)
            await asyncio.sleep(0.5)
        assert await RayDirectory().refresh() == {}
        deleted_at = time.monotonic()
        await asyncio.to_thread(serve.delete, APP)
        await asyncio.to_thread(wait_for, lambda: not process_alive(status.pid), 10)
        assert time.monotonic() - deleted_at < 10

    run(test)


def test_a_model_that_cannot_load_fails_the_deployment_with_its_reason(single: None) -> None:
    config = WorkerConfig(model=ModelConfig(path="/nowhere/at/all"))
    with pytest.raises(RuntimeError):
        deploy(config)
    status = serve.status().applications[APP]
    message = status.message + "".join(d.message for d in status.deployments.values())
    assert "/nowhere/at/all" in message
    assert rank_pids() == []
