"""Who waits for a device in a thread of its own."""

from __future__ import annotations

import threading

import pytest
import torch

from ellm.worker.executor.end_watch import EndWatch


def test_who_is_told_is_told_in_order_errors_or_not() -> None:
    watch, told, done = EndWatch("watch"), [], threading.Event()

    def fail() -> None:
        raise RuntimeError("the device is gone")

    watch.tell(fail, lambda: told.append("first"))
    watch.tell(lambda: None, lambda: (told.append("second"), done.set()))
    assert done.wait(30)
    assert told == ["first", "second"]
    watch.stop()


def test_the_thread_waits_with_the_gpu_of_the_one_that_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread's is GPU 0, where waiting would make room for itself."""
    chosen: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda gpu: chosen.append((threading.current_thread().name, gpu))
    )
    watch, done = EndWatch("watch"), threading.Event()
    watch.tell(lambda: None, done.set)
    assert done.wait(30)
    assert chosen == [("watch", 3)]
    watch.stop()
