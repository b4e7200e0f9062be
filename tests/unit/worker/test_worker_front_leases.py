"""WorkerFront over a real engine: who is dropped and when, draining, and a failed engine.

Every test runs over both lines: in the same process, and over a TCP connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from support.lines import LINE, LINES, Router, all_blocks_free, exhaust, over, run, until, worker
from support.workers import bulky, expected_tokens, request, worker_config

from ellm.worker.api import wire
from ellm.worker.api.channel import ChannelClosed
from ellm.worker.api.config import SchedulerConfig
from ellm.worker.api.request import EngineRequest


@pytest.fixture(params=LINES, autouse=True)
def _line(request: pytest.FixtureRequest) -> Iterator[None]:
    with over(request.param):
        yield


def test_a_silent_router_loses_its_requests_and_its_stream_and_a_speaking_one_does_not() -> None:
    async def test() -> None:
        async with worker(worker_config(router_lease_s=0.6), step_s=0.01) as w:
            silent, speaking = Router(w, "silent").read(), Router(w, "speaking").read()
            await silent.submit(request("a", 900), request("b", 900))  # 9 s
            await speaking.submit(request("c", 150))
            while not silent.closed:
                await speaking.abort()
                await asyncio.sleep(0.05)
            assert w.front.num_live == 1
            assert silent.reasons() == {}
            while not speaking.reasons():
                await speaking.abort()
                await asyncio.sleep(0.05)
            assert speaking.tokens("c") == expected_tokens(request("c", 150))
            await until(lambda: all_blocks_free(w), 1.0)
            assert "silent" not in dict(w.engine.report.last_submit_seq)

    run(test)


def test_outputs_that_nobody_takes_are_not_kept_for_longer_than_a_lease() -> None:
    async def test() -> None:
        async with worker(worker_config(router_lease_s=0.3)) as w:
            tenure = w.front.arrive("r0")  # and never asks for the stream
            w.front.submit(wire.submit("r0", 1, [request("a", 5)]))
            start = time.monotonic()
            while w.front.holds("r0", tenure):
                w.front.abort(wire.abort("r0", 1, []))
                await asyncio.sleep(0.02)
                assert time.monotonic() - start < 5
            assert w.front.num_dropped == 1

    run(test)


def test_a_router_that_does_not_read_is_cut_off_and_the_others_go_on() -> None:
    async def test() -> None:
        async with worker(worker_config(router_lease_s=1.0), step_s=0.004) as w:
            slow, quick = Router(w, "slow"), Router(w, "quick").read()
            stream = slow.channel.outputs("slow")
            await anext(stream)  # and then no more
            await slow.submit(bulky("a", 990))  # 4 s
            await quick.submit(request("b", 400))
            await until(lambda: w.front.num_live == 2)
            start = time.monotonic()
            while not w.front.num_dropped:
                await slow.abort()  # it lives, its stream does not
                await quick.abort()
                await asyncio.sleep(0.02)
            assert time.monotonic() - start > 0.8
            with pytest.raises(ChannelClosed):
                await exhaust(stream)
            while not quick.reasons():
                await quick.abort()
                await asyncio.sleep(0.02)
            assert quick.tokens("b") == expected_tokens(request("b", 400))
            assert w.front.num_dropped == 1
            await until(lambda: all_blocks_free(w), 1.0)

    run(test)


def test_nothing_is_taken_over_the_line_of_a_router_that_was_cut_off() -> None:
    async def test() -> None:
        async with worker(worker_config(router_lease_s=0.6), step_s=0.004) as w:
            slow = Router(w, "slow")
            stream = slow.channel.outputs("slow")
            await anext(stream)  # and then no more
            await slow.submit(bulky("a", 990))  # 4 s
            while not w.front.num_dropped:
                await slow.abort()
                await asyncio.sleep(0.02)
            for i in range(5):  # it does not know yet
                with contextlib.suppress(ChannelClosed):
                    await slow.submit(request(f"ghost{i}", 900))
                await asyncio.sleep(0.02)
                assert w.front.num_live == 0
            with pytest.raises(ChannelClosed):
                await exhaust(stream)
            again = Router(w, "slow").read()
            await again.submit(request("a", 10, attempt=1))
            await until(lambda: again.reasons())
            assert {(o.request_id, o.attempt) for o in again.outputs} == {("a", 1)}
            await until(lambda: all_blocks_free(w), 1.0)

    run(test)


def test_draining_finishes_what_runs_and_refuses_what_comes() -> None:
    async def test() -> None:
        async with worker(worker_config()) as w:
            router = Router(w).read()
            await router.submit(request("a", 100))
            await until(lambda: len(router.tokens("a")) > 3)
            draining = asyncio.create_task(w.front.drain(10))
            await until(lambda: router.reports and router.reports[-1].state == "draining", 0.5)
            await router.submit(request("late", 10))
            await until(lambda: "late" in router.reasons())
            late = next(o for o in router.outputs if o.request_id == "late")
            assert late.error is not None
            assert late.error[0] == "unavailable"
            assert await draining
            await until(lambda: "a" in router.reasons())  # the last tokens may still be under way
            assert router.tokens("a") == expected_tokens(request("a", 100))
            assert not router.closed
            w.front.end_streams()
            await until(lambda: router.closed)

    run(test)


def test_draining_hands_back_what_does_not_end_in_time() -> None:
    async def test() -> None:
        async with worker(worker_config()) as w:
            router = Router(w).read()
            await router.submit(request("a", 900))
            await until(lambda: router.outputs)
            start = time.monotonic()
            assert not await w.front.drain(0.2)
            assert time.monotonic() - start < 4  # two seconds of which it may wait for the router
            last = router.outputs[-1]
            assert (last.finish_reason, last.token_ids) == ("error", ())
            assert last.error is not None
            assert last.error[0] == "unavailable"
            assert last.output_index == len(router.tokens("a"))  # it can go on from there
            await until(lambda: all_blocks_free(w))
            w.core.check()
            w.front.end_streams()
            await until(lambda: router.closed)

    run(test)


def test_draining_hands_back_at_once_what_does_not_run() -> None:
    async def test() -> None:
        async with worker(replace(worker_config(), scheduler=SchedulerConfig(max_num_seqs=2))) as w:
            router = Router(w).read()
            await router.submit(*(request(f"r{i}", 200) for i in range(6)))
            await until(lambda: len({o.request_id for o in router.outputs}) == 2)
            ran = {o.request_id for o in router.outputs}
            draining = asyncio.create_task(w.front.drain(10))
            await until(lambda: len(router.reasons()) == 4, 0.3)  # those who run need 0.4 s
            assert set(router.reasons()) == {f"r{i}" for i in range(6)} - ran
            assert {o.error[0] for o in router.outputs if o.error is not None} == {"unavailable"}
            assert router.reports[-1].state == "draining"
            assert await draining
            await until(lambda: ran <= set(router.reasons()))  # the last tokens may still be under way
            for name in ran:
                assert router.tokens(name) == expected_tokens(request(name, 200))
            await until(lambda: all_blocks_free(w))
            w.front.end_streams()
            await until(lambda: router.closed)

    run(test)


def test_a_failed_engine_closes_the_channel() -> None:
    async def test() -> None:
        async with worker() as w:
            router = Router(w).read()
            await router.submit(request("a", 900))
            await until(lambda: router.outputs)
            w.executor.error = RuntimeError("device lost")
            await until(lambda: router.closed)
            assert w.front.report().state == "failed"
            assert router.reasons() == {}

    run(test)


def test_a_stall_shows_in_the_report() -> None:
    async def test() -> None:
        async with worker(worker_config()) as w:
            router = Router(w).read()
            w.executor.gate.clear()
            await router.submit(request("a", 4))
            await until(lambda: router.reports and router.reports[-1].since_last_step_s > 0.2)
            w.executor.gate.set()
            await until(lambda: router.reasons() and router.reports[-1].since_last_step_s == 0.0)

    run(test)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_routers_do_no_block_is_lost(seed: int) -> None:
    async def test() -> None:
        rng = random.Random(seed)
        async with worker(worker_config(router_lease_s=0.8), step_s=0.001) as w:
            routers = [Router(w, f"r{i}").read() for i in range(3)]
            mine: dict[str, list[EngineRequest]] = {r.name: [] for r in routers}
            for i in range(250):
                router = rng.choice(routers)
                known = mine[router.name]
                match rng.randrange(6):
                    case 0 | 1 | 2:
                        new = request(f"{router.name}-{i}", rng.choice((1, 5, 60)), rng.randint(1, 200))
                        known.append(new)
                        await router.submit(new, *rng.sample(known, min(2, len(known))))
                    case 3:
                        await router.abort(
                            *((r.request_id, 0) for r in rng.sample(known, min(3, len(known))))
                        )
                    case 4:
                        await router.abort((f"{router.name}-{i + 1}", 0))  # perhaps before its submission
                    case 5 if (
                        i % 9 == 0 and LINE.get() == "local"
                    ):  # a new connection loses what is on its way
                        router.read()
                await asyncio.sleep(rng.choice((0, 0, 0.002, 0.01)))
            await until(lambda: w.front.num_live == 0)  # those who fall silent lose what is left
            await until(lambda: all_blocks_free(w))
            w.core.check()
            for router in routers:
                for done in router.reasons():
                    first = next(r for r in mine[router.name] if r.request_id == done)
                    assert router.tokens(done) == expected_tokens(first)

    run(test)


def test_heartbeats_that_end_are_told_and_a_loop_that_stands_still_shows() -> None:
    async def test() -> None:
        async with worker(worker_config()) as w:
            failures: list[BaseException] = []
            w.front._on_failure = failures.append
            await asyncio.sleep(0.1)
            assert w.front.since_tick_s() < 0.5
            time.sleep(0.6)  # whatever blocks the loop
            assert w.front.since_tick_s() > 0.5
            await until(lambda: w.front.since_tick_s() < 0.5)
            assert not failures

            def broken() -> None:
                raise KeyError("a broken invariant")

            w.front._tick = broken  # type: ignore[method-assign]
            await until(lambda: failures)
            assert w.front._ticker is not None
            assert isinstance(w.front._ticker.exception(), KeyError)

    run(test)
