"""WorkerFront over a real engine: one merged stream per router, reports in it, submissions and aborts.

Every test runs over both lines: in the same process, and over a TCP connection.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest
from support.lines import LINES, Router, all_blocks_free, over, run, until, worker
from support.workers import expected_tokens, request, worker_config

from ellm.worker.api import wire
from ellm.worker.api.channel import ChannelClosed
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.report import WorkerReport
from ellm.worker.packed_report import PackedReport


@pytest.fixture(params=LINES, autouse=True)
def _line(request: pytest.FixtureRequest) -> Iterator[None]:
    with over(request.param):
        yield


def test_one_message_per_step_carries_all_requests_of_a_router_and_no_others() -> None:
    async def test() -> None:
        async with worker() as w:
            a, b = Router(w, "a").read(), Router(w, "b").read()
            await a.submit(*(request(f"a{i}", 20) for i in range(6)))
            await b.submit(request("b0", 20))
            await until(lambda: len(a.reasons()) == 6 and b.reasons() == {"b0": "length"})
            for i in range(6):
                assert a.tokens(f"a{i}") == expected_tokens(request(f"a{i}", 20))
            assert b.tokens("b0") == expected_tokens(request("b0", 20))
            assert {o.request_id for o in b.outputs} == {"b0"}
            assert len([n for _, _, n in a.steps if n]) <= 22  # 20 steps, however many requests
            assert [seq for _, seq, _ in a.steps] == list(range(len(a.steps)))
            assert w.front.num_live == 0

    run(test)


def test_an_idle_stream_says_every_heartbeat_how_the_worker_is() -> None:
    async def test() -> None:
        async with worker() as w:
            router = Router(w).read()
            for _ in range(4):
                await router.abort()  # says only that the router is there
                await asyncio.sleep(0.15)
            gaps = [b[0] - a[0] for a, b in zip(router.steps, router.steps[1:], strict=False)]
            assert len(router.reports) == len(router.steps) >= 5
            assert sorted(gaps)[len(gaps) // 2] < 0.1  # the heartbeat is 0.05
            assert max(gaps) < 0.5
            assert {r.state for r in router.reports} == {"ready"}
            assert [r.seq for r in router.reports] == sorted(r.seq for r in router.reports)

    run(test)


def test_a_busy_stream_carries_reports_too_but_not_with_every_step() -> None:
    async def test() -> None:
        async with worker(worker_config(heartbeat_s=0.2)) as w:
            router = Router(w).read()
            await router.submit(request("a", 200))
            await until(lambda: router.reasons())
            assert 2 <= len(router.reports) <= len(router.steps) / 3
            assert dict(router.reports[-1].last_submit_seq) == {"r0": 1}
            assert max(r.num_running for r in router.reports) == 1

    run(test)


def test_a_submission_is_taken_once_also_after_its_end() -> None:
    async def test() -> None:
        async with worker() as w:
            router = Router(w).read()
            await router.submit(request("a", 10), request("a", 10))
            await router.submit(request("a", 10))
            await until(lambda: router.reasons())
            await router.submit(request("a", 10))
            await router.submit(request("b", 10))
            await until(lambda: "b" in router.reasons())
            assert router.tokens("a") == expected_tokens(request("a", 10))
            assert w.engine.report.generation_tokens <= 20

    run(test)


def test_an_abort_that_overtook_its_submission_still_counts() -> None:
    async def test() -> None:
        async with worker() as w:
            router = Router(w).read()
            await router.abort(("a", 1))
            await router.submit(request("a", 10, attempt=1), request("b", 10))
            await until(lambda: "b" in router.reasons())
            assert router.tokens("a", 1) == ()
            await router.submit(request("a", 10, attempt=2))  # a newer attempt is another matter
            await until(lambda: "a" in router.reasons())
            assert router.tokens("a", 2) == expected_tokens(request("a", 10))

    run(test)


def test_a_newer_attempt_takes_the_place_of_an_older_one() -> None:
    async def test() -> None:
        async with worker() as w:
            router = Router(w).read()
            await router.submit(request("a", 500))
            await until(lambda: len(router.tokens("a")) > 3)
            await router.submit(request("a", 30, attempt=1))
            seen = len(router.tokens("a"))
            await router.submit(request("a", 500))  # a late copy of the first
            await router.abort(("a", 0))  # and its late abort
            await until(lambda: router.reasons())
            assert router.tokens("a", 1) == expected_tokens(request("a", 30))
            assert len(router.tokens("a")) <= seen + 2  # what was on its way
            await until(lambda: all_blocks_free(w))

    run(test)


def test_an_abort_is_idempotent_and_only_for_ones_own() -> None:
    async def test() -> None:
        async with worker() as w:
            a, b = Router(w, "a").read(), Router(w, "b").read()
            await a.submit(request("x", 900))
            await b.submit(request("y", 40))
            await until(lambda: len(a.tokens("x")) > 3)
            for _ in range(3):
                await a.abort(("x", 0), ("y", 0))
            seen = len(a.tokens("x"))
            await until(lambda: b.reasons() == {"y": "length"})
            assert len(a.tokens("x")) <= seen + 1
            assert w.front.num_live == 0
            await until(lambda: all_blocks_free(w))
            w.core.check()

    run(test)


def test_output_of_an_older_attempt_that_was_on_its_way_is_dropped() -> None:
    async def test() -> None:
        async with worker(worker_config()) as w:
            router = Router(w).read()
            w.executor.gate.clear()
            await router.submit(request("a", 10))
            await router.submit(request("a", 10, attempt=1))
            await until(lambda: dict(w.engine.report.last_submit_seq) == {"r0": 2})
            w.front.publish([SequenceOutput("a", 0, 0, (7,), "length"), SequenceOutput("b", 0, 0, (7,))])
            await asyncio.sleep(0.05)
            assert w.front.num_live == 1
            w.executor.gate.set()
            await until(lambda: router.reasons())
            assert {o.attempt for o in router.outputs} == {1}

    run(test)


def test_a_router_that_comes_again_starts_anew() -> None:
    async def test() -> None:
        async with worker(worker_config()) as w:
            first = Router(w).read()
            await first.submit(request("a", 900))
            await until(lambda: len(first.tokens("a")) > 20)
            second = Router(w).read()
            await until(lambda: first.closed and second.steps)
            with contextlib.suppress(ChannelClosed):
                await first.submit(request("late", 900))  # over the former line
            await second.submit(request("a", 30, attempt=1))
            await until(lambda: second.reasons())
            assert second.tokens("a", 1) == expected_tokens(request("a", 30))
            assert {(o.request_id, o.attempt) for o in second.outputs} == {("a", 1)}
            assert dict(w.engine.report.last_submit_seq)["r0"] == 1
            assert w.front.num_streams == 1
            assert w.front.num_live == 0
            await until(lambda: all_blocks_free(w))

    run(test)


def test_a_submission_waits_for_the_stream() -> None:
    async def test() -> None:
        async with worker() as w:
            router = Router(w)
            submission = asyncio.create_task(router.submit(request("a", 10)))
            await asyncio.sleep(0.05)
            assert not submission.done()
            router.read()
            await submission
            await until(lambda: router.reasons())
            assert router.tokens("a") == expected_tokens(request("a", 10))

    run(test)


def test_a_message_of_another_kind_or_version_is_refused() -> None:
    async def test() -> None:
        async with worker() as w:
            with pytest.raises(wire.WireError):
                w.front.submit(wire.submit("r", 0, []))  # it has not arrived
            w.front.arrive("r")
            with pytest.raises(wire.WireError):
                w.front.submit(wire.abort("r", 0, []))
            with pytest.raises(wire.WireError):
                w.front.submit((wire.VERSION + 2, "submit", "r", 0, []))
            newer = (wire.VERSION + 1, "submit", "r", 0, [], "a field of the future")
            w.front.submit(newer)

    run(test)


def test_a_report_is_sent_once_to_each() -> None:
    """Steps of 2 ms, and a new report every 0.2 s: a tick in between finds nothing to tell."""

    async def test() -> None:
        async with worker(worker_config(heartbeat_s=0.2)) as w:
            routers = [Router(w, f"r{i}").read() for i in range(4)]
            await asyncio.gather(*(r.submit(request(f"a{r.name}", 300)) for r in routers))
            await until(lambda: all(r.reasons() for r in routers))
            for router in routers:
                # The first ones answer the stream and the submission.
                seqs = [r.seq for r in router.reports][2:]
                assert len(seqs) >= 2
                assert len(set(seqs)) == len(seqs)

    run(test)


def test_a_report_is_packed_once_for_all() -> None:
    made: list[int] = []

    def make() -> WorkerReport:
        made.append(1)
        return WorkerReport(seq=len(made))

    packed = PackedReport(max_age_s=0.1)
    first = packed.get((1, "ready"), make, 0.0)
    assert all(packed.get((1, "ready"), make, 0.01 * i) is first for i in range(10))
    assert len(made) == 1
    assert packed.get((2, "ready"), make, 0.09) != first
    packed.get((2, "draining"), make, 0.09)
    packed.get((2, "draining"), make, 0.2)  # it tells of a moment that is past
    assert len(made) == 4
