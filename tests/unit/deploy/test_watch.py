"""What `ellm serve` makes of a cluster that does not answer any more."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from ellm.deploy import application, server


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "WATCH_S", 0.01)
    monkeypatch.setattr(server, "LOST_S", 0.05)
    monkeypatch.setattr(application, "status", lambda: None)


def watch(asked: threading.Event, *, own: bool, lines: list[str]) -> bool:
    interrupt: Any = SimpleNamespace(asked=asked)
    progress: Any = SimpleNamespace(line=lines.append)
    return server.watch(interrupt, progress, os.getppid(), own=own)


def test_a_cluster_of_our_own_that_is_silent_is_lost() -> None:
    lines: list[str] = []
    assert watch(threading.Event(), own=True, lines=lines)
    assert "ending" in lines[0]


def test_a_joined_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head may come back: the application is neither ended nor reported as lost."""
    lines: list[str] = []
    asked = threading.Event()
    silences = 0

    def status() -> application.Status | None:
        nonlocal silences
        silences += not lines
        if lines and silences < 1_000:  # back after it was missed
            silences = 1_000
            return application.Status("RUNNING")
        if silences >= 1_000:
            asked.set()
        return None

    monkeypatch.setattr(application, "status", status)
    assert not watch(asked, own=False, lines=lines)
    assert len(lines) == 1
    assert "may come back" in lines[0]
