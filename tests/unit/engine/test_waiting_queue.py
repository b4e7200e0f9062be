"""The queue against a sorted list."""

from __future__ import annotations

from random import Random

import pytest
from support.engine_driver import request

from ellm.worker.engine.sequence import Sequence, SequenceState
from ellm.worker.engine.waiting_queue import WaitingQueue


def sequence(order: int, priority: int = 0, num_prompt: int = 3) -> Sequence:
    return Sequence(request(f"r{order}", num_prompt, priority=priority), order, frozenset())


def finish(queue: WaitingQueue, seq: Sequence) -> None:
    seq.state = SequenceState.FINISHED
    queue.discard(seq)


def test_order_is_priority_then_arrival() -> None:
    queue = WaitingQueue(10)
    for order, priority in enumerate([1, 0, 2, 0, 1]):
        queue.push(sequence(order, priority))
    assert [queue.pop().order for _ in range(5)] == [1, 3, 0, 4, 2]
    assert queue.peek() is None


def test_who_comes_back_is_in_front_of_who_has_not_run() -> None:
    queue = WaitingQueue(10)
    for order in range(3):
        queue.push(sequence(order))
    first = queue.pop()
    queue.pop()
    queue.push(first)
    assert [queue.pop().order for _ in range(2)] == [0, 2]


def test_it_is_bounded_for_newcomers() -> None:
    queue = WaitingQueue(2)
    queue.push(sequence(0))
    assert not queue.full
    second = sequence(1)
    queue.push(second)
    assert queue.full
    finish(queue, second)
    assert not queue.full


def test_a_long_walk_agrees_with_a_sorted_list() -> None:
    rng, queue, model = Random(3), WaitingQueue(10**6), list[Sequence]()
    for order in range(20_000):
        if rng.random() < 0.5:
            seq = sequence(order, rng.randrange(3), rng.randint(1, 5))
            queue.push(seq)
            model.append(seq)
        elif model and rng.random() < 0.5:
            model.sort(key=lambda seq: seq.key)
            assert queue.peek() is model[0]
            assert queue.pop() is model.pop(0)
        elif model:
            finish(queue, model.pop(rng.randrange(len(model))))
        assert len(queue) == len(model)
        if order % 1000 == 0:
            queue.check()
            assert queue.num_tokens == sum(seq.num_prompt for seq in model)


def test_the_dead_do_not_pile_up() -> None:
    queue = WaitingQueue(10**6)
    kept = sequence(0, priority=-1)  # in front: peek never walks over the dead behind it
    queue.push(kept)
    for order in range(1, 5_000):
        seq = sequence(order)
        queue.push(seq)
        finish(queue, seq)
    assert len(queue._heap) < 200
    assert queue.peek() is kept


def test_the_check_notices_damage() -> None:
    queue = WaitingQueue(10)
    seq = sequence(0)
    queue.push(seq)
    queue.check()
    seq.state = SequenceState.RUNNING
    with pytest.raises(AssertionError, match="waits and runs"):
        queue.check()
    seq.state = SequenceState.FINISHED  # without a word to the queue
    with pytest.raises(AssertionError, match="number of live"):
        queue.check()
