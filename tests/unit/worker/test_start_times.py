"""What a worker's start took: phases add up to the whole, and time before the process counts."""

from __future__ import annotations

from ellm.worker.start_times import PROCESS, StartTimes


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_follow_one_another_and_add_up() -> None:
    clock = Clock()
    start = StartTimes(clock)
    for seconds, phase in ((2.0, "importing torch"), (3.0, "loading weights"), (0.5, "loading weights")):
        clock.now += seconds
        start.enter(phase)
    clock.now += 1.0
    start.enter("warming up")
    clock.now += 4.0
    assert start.seconds() == (
        (PROCESS, 2.0),
        ("importing torch", 3.0),
        ("loading weights", 1.5),
        ("warming up", 4.0),
    )
    assert start.seconds() == start.seconds()


def test_a_phase_that_comes_back_is_one() -> None:
    clock = Clock()
    start = StartTimes(clock)
    for phase in ("a", "b", "a"):
        start.enter(phase)
        clock.now += 1.0
    assert dict(start.seconds()) == {PROCESS: 0.0, "a": 2.0, "b": 1.0}


def test_whoever_waited_for_the_process_tells_what_it_cannot_know() -> None:
    clock = Clock()
    start = StartTimes(clock)
    clock.now += 1.0
    start.waited(5.0)  # of which it knows one
    start.enter("loading weights")
    assert dict(start.seconds())[PROCESS] == 5.0
    start.waited(0.0)  # nobody has waited: nothing is taken away
    assert dict(start.seconds())[PROCESS] == 5.0
