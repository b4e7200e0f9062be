"""What a test asks of processes, any of which may end while it is looked at."""

from __future__ import annotations

from contextlib import suppress

import psutil


def children_named(part: str) -> list[int]:
    """Process ids below this process whose name holds `part`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if part in process.name():
                found.append(process.pid)
    return found


def process_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
