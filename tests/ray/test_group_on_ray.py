"""A worker of two ranks on a real model: they serve together, and whatever befalls one ends both."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from ray import serve
from support.cluster import APP, deploy, local_cluster, wait_for, workers
from support.processes import process_alive
from support.routers import Router, run, until, until_replaced
from support.tree import ROOT
from support.workers import request

from ellm.router.replicas import RayDirectory
from ellm.worker.api.config import CacheConfig, ModelConfig, WorkerConfig
from ellm.worker.api.request import EngineRequest
from ellm.worker.build import load_engine

pytestmark = pytest.mark.ray

CHECKPOINT = ROOT / "deploy" / "bundled" / "pydoc-5m"
CONFIG = WorkerConfig(
    model=ModelConfig(path=str(CHECKPOINT), dtype="float32", device="cpu"),
    cache=CacheConfig(num_blocks=128),
    tensor_parallel_size=2,
    num_threads=1,
    stall_s=3.0,
    router_lease_s=2.0,
    drain_timeout_s=5.0,
    profile=False,
)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_cluster():
        yield


def said_by_one_rank(*requests: EngineRequest) -> dict[str, tuple[int, ...]]:
    loaded = load_engine(replace(CONFIG, tensor_parallel_size=1), lambda what, share: None)
    tokens: dict[str, tuple[int, ...]] = {r.request_id: () for r in requests}
    for each in requests:
        loaded.core.add_request(each, 0.0)
    while (plan := loaded.core.begin_step(0.0)) is not None:
        for output in loaded.core.finish_step(plan, loaded.executor.execute(plan), 0.0):
            tokens[output.request_id] += output.token_ids
    loaded.executor.close()
    return tokens


def test_a_group_lives_and_dies_as_one() -> None:
    requests = [request(f"r{i}", 20, prompt_len=10 + 30 * i) for i in range(4)]
    expected = said_by_one_rank(*requests)
    deploy(CONFIG)
    pids: list[int] = []

    async def test() -> None:
        directory = RayDirectory()
        (group,) = await workers(directory)
        assert group.info.tensor_parallel_size == len(set(group.info.rank_pids)) == 2
        assert all(map(process_alive, group.info.rank_pids))
        router = Router(group)
        await router.submit(*requests)
        await until(lambda: len(router.finished()) == 4, 30)
        assert {r.request_id: router.tokens(r.request_id) for r in requests} == expected

        # Rank 1 is killed while there is work, then frozen while there is none.
        await router.submit(request("a", 1500))
        await until(lambda: router.tokens("a"), 10)
        os.kill(group.info.rank_pids[1], signal.SIGKILL)
        killed_at = time.monotonic()
        await until(lambda: router.closed_at is not None, 10)
        assert router.closed_at is not None
        assert router.closed_at - killed_at < 2.0
        (again,) = await until_replaced(directory, {group.info.epoch}, 1)
        assert not any(map(process_alive, group.info.rank_pids))
        await router.close()

        os.kill(again.info.rank_pids[1], signal.SIGSTOP)
        (third,) = await until_replaced(directory, {group.info.epoch, again.info.epoch}, 1)
        assert not any(map(process_alive, again.info.rank_pids))
        router = Router(third)
        await router.submit(requests[0])
        await until(lambda: router.finished() == {"r0"}, 20)
        await router.close()
        pids.extend(third.info.rank_pids)

    run(test)
    serve.delete(APP)
    wait_for(lambda: not any(map(process_alive, pids)), 15)


def test_a_group_that_cannot_load_says_why() -> None:
    with pytest.raises(RuntimeError):
        deploy(replace(CONFIG, tensor_parallel_size=3))
    status = serve.status().applications[APP]
    message = status.message + "".join(d.message for d in status.deployments.values())
    assert "tensor_parallel_size = 3" in message
    assert "died" not in message
    serve.delete(APP)
