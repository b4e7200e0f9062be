"""Loading on a thread that ends with it.

A thread that computes has a team of OpenMP's, a cache and working memory for as long as it lives, and where
the teams have more threads than there are processors, none spins any more between two kernels: each has to be
woken, and a decode step of few rows takes half as long again. So whoever loads does not compute in its own
thread, which lives on beside the one that steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
Progress = Callable[[str, float], None]  # (what, share done)


class Abandoned(BaseException):
    """Nobody waits any more for what is loaded."""


def on_own_thread(load: Callable[[Progress], T], progress: Progress, discard: Callable[[T], None]) -> T:
    """`load(progress)`, on a thread that has ended when this returns. Where the caller is interrupted, it is
    at once: the load ends with Abandoned when it next tells its progress, and what it makes nevertheless is
    given to `discard`."""
    loaded: Future[T] = Future()
    left = threading.Event()

    def tell(what: str, share: float) -> None:
        if left.is_set():
            raise Abandoned
        progress(what, share)

    def run() -> None:
        try:
            made = load(tell)
        except BaseException as error:  # for the caller
            loaded.set_exception(error)
        else:
            loaded.set_result(made)

    def end(future: Future[T]) -> None:
        if future.exception() is None:
            discard(future.result())

    thread = threading.Thread(target=run, name="ellm-load", daemon=True)
    try:
        thread.start()
        made = loaded.result()
        thread.join()
    except BaseException:
        left.set()
        loaded.add_done_callback(end)
        raise
    return made
