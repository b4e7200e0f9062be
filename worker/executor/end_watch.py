"""A thread that waits for what a device was asked for, so that whoever asked can wait for other things, too.

Waiting for a device cannot be interrupted, and looking at it again and again keeps a core busy: here a thread
sleeps until the device is through, and then tells. It knows no steps, and of devices only that a new thread
would otherwise wait with GPU 0 as its own, and so make room there for every rank that sees several.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch

_Asked = tuple[Callable[[], object], Callable[[], object]]


class EndWatch:
    """`tell` may be called by one thread at a time; the first call makes the thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._asked: SimpleQueue[_Asked | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def tell(self, wait: Callable[[], object], then: Callable[[], object]) -> None:
        """Call `then` when `wait` has returned, or raised: whoever is told will meet the error itself. One
        after the other."""
        self._asked.put((wait, then))
        if self._thread is None:
            on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
            gpu = torch.cuda.current_device() if on_gpu else None
            self._thread = threading.Thread(target=self._run, args=(gpu,), name=self._name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Soon; a device that hangs is not waited for."""
        self._asked.put(None)

    def _run(self, gpu: int | None) -> None:
        if gpu is not None:
            torch.cuda.set_device(gpu)
        while (asked := self._asked.get()) is not None:
            wait, then = asked
            try:
                wait()
            except Exception:  # the edge: the device's error is raised again where its result is read
                pass
            finally:
                then()
            del asked, wait, then  # what was waited for is not kept alive until the next
