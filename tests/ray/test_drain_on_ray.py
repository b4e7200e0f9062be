"""A worker is emptied on request: its requests go on elsewhere, and it is replaced or stays as it is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
import ray
from ray import serve
from support.cluster import APP, deploy, local_cluster, simulated_config, wait_for, workers
from support.processes import process_alive
from support.routers import Router, run, until, until_replaced
from support.workers import request

from ellm.deploy.commands import drain
from ellm.router.replicas import RayDirectory
from ellm.worker.api.actor_name import NAMESPACE, actor_name
from ellm.worker.api.config import SchedulerConfig

pytestmark = pytest.mark.ray

CONFIG = replace(simulated_config(), scheduler=SchedulerConfig(max_num_seqs=4))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_cluster():
        deploy(CONFIG, num_workers=2)
        yield
        serve.delete(APP)


def test_a_drained_worker_gives_back_what_waits_at_once_and_is_replaced(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def test() -> None:
        directory = RayDirectory()
        victim, other = await workers(directory)
        router = Router(victim)
        await router.submit(*(request(f"r{i}", 300) for i in range(6)))  # 1.5 s; 4 run
        await until(lambda: len({o.request_id for o in router.outputs}) == 4)
        draining = asyncio.create_task(asyncio.to_thread(drain.drain, "w0", None, 20.0, keep=False))
        await until(lambda: len(router.finished()) == 2, 1.0)  # those that wait
        assert {o.error[0] for o in router.outputs if o.error is not None} == {"unavailable"}
        await until(lambda: router.closed_at is not None, 10)
        ended = [o for o in router.outputs if o.finish_reason == "length"]
        assert len(ended) == 4
        assert await draining == 0
        found = await until_replaced(directory, {victim.info.epoch}, 2)
        assert other.info.epoch in {c.info.epoch for c in found}
        assert not process_alive(victim.info.rank_pids[0])
        await router.close()

    run(test)
    assert "w0 is drained (all requests ended there or were handed over)" in capsys.readouterr().out


def test_a_drained_worker_that_is_kept_stays_up_and_takes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        directory = RayDirectory()
        victim, _ = await workers(directory)
        router = Router(victim)
        await router.submit(request("a", 3000))
        await until(lambda: router.outputs)
        assert await asyncio.to_thread(drain.drain, "w0", "simulated", 0.5, keep=True) == 0
        assert "time was up" in capsys.readouterr().out
        last = router.outputs[-1]
        assert (last.finish_reason, last.output_index) == ("error", len(router.tokens("a")))
        await asyncio.sleep(3.0)  # the supervisor leaves it alone
        assert process_alive(victim.info.rank_pids[0])
        assert router.reports[-1].state == "draining"
        await router.submit(request("late"))
        await until(lambda: "late" in router.finished())
        name = actor_name(victim.info.model, victim.info.worker_id, victim.info.epoch)
        assert ray.get(ray.get_actor(name, NAMESPACE).status.remote()).num_live == 0
        # Without --keep it is replaced after all.
        assert await asyncio.to_thread(drain.drain, "w0", None, None, keep=False) == 0
        await until_replaced(directory, {victim.info.epoch}, 2)
        await router.close()

    run(test)


def test_who_is_not_there_cannot_be_drained() -> None:
    with pytest.raises(drain.NoSuchWorker, match="there are: w0, w1"):
        drain.drain("w7", None, None, keep=False)
    with pytest.raises(drain.NoSuchWorker, match="there are: none"):
        drain.drain("w0", "another", None, keep=False)
    wait_for(lambda: serve.status().applications[APP].status == "RUNNING", 20)
