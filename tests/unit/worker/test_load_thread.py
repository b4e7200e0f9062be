"""Loading on a thread that ends: what comes back, what is raised, and what an interrupt leaves."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from ellm.worker.load_thread import Abandoned, on_own_thread

Tell = Callable[[str, float], None]
WAIT_S = 10.0


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Is heard, also where whoever started the tests has it ignored, as a shell does in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_is_loaded_comes_back_and_the_thread_has_ended() -> None:
    threads: list[threading.Thread] = []
    told: list[str] = []

    def load(tell: Tell) -> int:
        threads.append(threading.current_thread())
        tell("weights", 0.5)
        return 7

    discarded: list[int] = []
    assert on_own_thread(load, lambda what, share: told.append(what), discarded.append) == 7
    assert told == ["weights"]
    assert not threads[0].is_alive()
    assert not discarded


def test_errors_are_raised_as_they_are() -> None:
    def load(tell: Tell) -> int:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        on_own_thread(load, lambda what, share: None, lambda made: None)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("tells", [True, False])
def test_an_interrupt_does_not_wait_and_nothing_is_left(tells: bool) -> None:
    goes_on, over = threading.Event(), threading.Event()
    told: list[str] = []
    ends: list[object] = []

    def load(tell: Tell) -> int:
        _thread.interrupt_main()
        assert goes_on.wait(WAIT_S)
        try:
            if tells:
                tell("weights", 0.5)
        except Abandoned as end:
            ends.append(type(end))
            over.set()
            raise
        return 7

    def discard(made: int) -> None:
        ends.append(made)
        over.set()

    with pytest.raises(KeyboardInterrupt):
        on_own_thread(load, lambda what, share: told.append(what), discard)
    goes_on.set()
    assert over.wait(WAIT_S)
    assert ends == [Abandoned if tells else 7]
    assert not told
