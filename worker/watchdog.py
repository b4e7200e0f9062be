"""Watchdog: a thread that ends this process once nobody is left who would miss it.

Ray does not promise that: a rank outlives a killed raylet by many seconds, and its supervisor's silence (a
cut network, a killed replica) tells it nothing. A rank that goes on holds device memory that its successor
needs.
The watchdog knows two kinds of parent: a process on this machine, and a lease that someone renews.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

EXIT_ORPHANED = 70


def process_start(pid: int) -> str | None:
    """A mark of the process that has this pid now: None if there is none. It tells a reused pid apart where
    the system has /proc."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]  # state; start time in ticks
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


def _end_process(reason: str) -> None:
    log.error("this process ends: %s", reason)
    logging.shutdown()
    os._exit(EXIT_ORPHANED)


class Watchdog:
    """Checks every `period_s`; calls `end` once with the reason, which by default does not return."""

    def __init__(
        self,
        lease_s: float,
        parent_pids: tuple[int, ...] = (),
        *,
        period_s: float = 0.5,
        end: Callable[[str], None] = _end_process,
    ) -> None:
        self._lease_s = lease_s
        self._period_s = period_s
        self._end = end
        self._silent_s = 0.0
        self._parents = {pid: process_start(pid) for pid in parent_pids}
        self._original_ppid = os.getppid()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ellm-watchdog", daemon=True)
        self._thread.start()

    def renew(self) -> None:
        """The lease starts anew. From any thread."""
        self._silent_s = 0.0

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        checked_at = time.monotonic()
        while not self._stopped.wait(self._period_s):
            now = time.monotonic()
            # Time in which this process stood still counts little: the supervisor may have stood still, too.
            self._silent_s += min(now - checked_at, 2 * self._period_s)
            checked_at = now
            reason = self._reason()
            if reason is not None:
                self._end(reason)
                return

    def _reason(self) -> str | None:
        if os.getppid() != self._original_ppid:
            return "its parent process is gone"
        for pid, start in self._parents.items():
            if start is None or process_start(pid) != start:
                return f"process {pid}, which started it, is gone"
        if self._silent_s > self._lease_s:
            return f"nobody has renewed its lease for {self._silent_s:.1f} s"
        return None
