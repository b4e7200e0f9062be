"""Every process of one `ellm serve`, however it was started: each inherits a mark in its environment.

Ray ends what it started, but not always all: a process whose parent died first has no one left to end it.
Some of Ray's also write their title over their environment. On Linux those are found by descent: a process
that adopts orphans is the ancestor of all that was ever started below it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
import uuid

import psutil

MARK = "ELLM_SESSION"
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class Session:
    """Marks this process's environment; what is started from now on belongs to the session."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        os.environ[MARK] = self.mark
        self._adopts = False

    def adopt_orphans(self) -> None:
        """From now on all that descends from this process belongs to the session, as far as the system can
        tell; the caller has to wait for children that it did not start."""
        if sys.platform == "linux":
            self._adopts = ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0

    def processes(self) -> list[psutil.Process]:
        """All of them that run, but this one."""
        found = set(psutil.Process().children(recursive=True)) if self._adopts else set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get(MARK) == self.mark:
                    found.add(process)
        return [process for process in found if _runs(process)]

    def end(self, grace_s: float) -> list[str]:
        """Wait so long for them to end by themselves, then kill them. Returns who had to be killed."""
        deadline = time.monotonic() + grace_s
        killed = []
        empty = 0
        while empty < 2:  # a process that is just being started shows no environment yet: look twice
            left = self.processes()
            empty = 0 if left else empty + 1
            if left and time.monotonic() >= deadline:
                killed += [_kill(process) for process in left]
                psutil.wait_procs(left, timeout=2.0)
            else:
                time.sleep(0.05)
        return killed


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _kill(process: psutil.Process) -> str:
    name = f"process {process.pid}"
    with contextlib.suppress(psutil.Error):
        name = f"{process.name()} ({process.pid})"
        process.kill()
    return name
