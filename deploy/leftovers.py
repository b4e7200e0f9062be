"""Every process of one `ellm serve`, however it was started: each inherits a mark in its environment.

Ray ends what it started, but not always all: a process whose parent died first has no one left to end it.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid

import psutil

MARK = "ELLM_SESSION"


class Session:
    """Marks this process's environment; what is started from now on belongs to the session."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        os.environ[MARK] = self.mark

    def processes(self) -> list[psutil.Process]:
        """All of them but this one."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

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


def _kill(process: psutil.Process) -> str:
    name = f"process {process.pid}"
    with contextlib.suppress(psutil.Error):
        name = f"{process.name()} ({process.pid})"
        process.kill()
    return name
