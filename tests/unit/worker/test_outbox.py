"""Outbox: what merges, what lags, who may take. Time is made up."""

from __future__ import annotations

import asyncio

from ellm.worker.api.output import SequenceOutput
from ellm.worker.outbox import Outbox


def output(index: int) -> SequenceOutput:
    return SequenceOutput("a", 0, index, (index,))


def indices(outputs: list[SequenceOutput] | None) -> list[int]:
    assert outputs is not None
    return [o.output_index for o in outputs]


def test_steps_within_a_window_merge_and_keep_their_order() -> None:
    box = Outbox("r", 1, max_items=10, lease_s=1.0, now=0.0)  # a window of 0.1 s
    for i, now in enumerate((0.0, 0.05, 0.09, 0.11, 0.3)):
        box.put([output(i)], now)
    assert box.num_items == 3
    box.open()
    box.report_due = False
    taken = [indices(asyncio.run(box.take(1))) for _ in range(3)]
    assert taken == [[0, 1, 2], [3], [4]]


def test_the_bound_in_items_is_the_lease_however_short_the_steps() -> None:
    for step_s in (0.001, 0.02, 0.3):
        box = Outbox("r", 1, max_items=50, lease_s=5.0, now=0.0)
        now, i = 0.0, 0
        while not box.lags(now):
            box.put([output(i)], now)
            now, i = now + step_s, i + 1
        assert 5.0 <= now <= 5.0 + 3 * max(step_s, 0.1)
        assert box.num_items <= 51


def test_age_counts_where_nothing_new_comes() -> None:
    box = Outbox("r", 1, max_items=50, lease_s=5.0, now=0.0)
    assert not box.lags(100.0)
    box.put([output(0)], 100.0)
    assert not box.lags(104.9)
    assert box.lags(105.1)


def test_only_the_newest_stream_takes() -> None:
    async def test() -> None:
        box = Outbox("r", 1, max_items=10, lease_s=1.0, now=0.0)
        first = box.open()
        assert await box.take(first) == []  # a report is due at once
        box.report_due = False
        waiting = asyncio.create_task(box.take(first))
        await asyncio.sleep(0)
        second = box.open()
        assert await waiting is None
        box.report_due = False
        box.put([output(0)], 0.0)
        assert await box.take(first) is None
        assert indices(await box.take(second)) == [0]

    asyncio.run(test())


def test_closing_ends_the_stream_and_drops_what_waits() -> None:
    async def test() -> None:
        box = Outbox("r", 1, max_items=10, lease_s=1.0, now=0.0)
        stream = box.open()
        box.put([output(0)], 0.0)
        box.close()
        assert await box.take(stream) is None
        assert box.num_items == 0

    asyncio.run(test())
