"""Watchdog in real processes: it ends a child whose parent, starter or lease is gone, and no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from support.workers import wait_until

from ellm.worker.watchdog import EXIT_ORPHANED, Watchdog, process_start

# Starts a grandchild under a watchdog and prints its pid; then does as it is told.
CHILD = """
import os, sys, time
from ellm.worker.watchdog import Watchdog
dog = Watchdog(float(sys.argv[1]), tuple(map(int, sys.argv[2:])), period_s=0.05)
print(os.getpid(), flush=True)
for _ in range(200):
    time.sleep(0.05)
"""
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}, "60"])
time.sleep(30)
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


def read_pid(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def finish(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_it_ends_a_process_whose_parent_is_killed() -> None:
    parent = start(PARENT)
    pid = read_pid(parent)
    mark = process_start(pid)
    assert mark is not None
    time.sleep(0.2)
    assert process_start(pid) == mark
    finish(parent)
    deadline = time.monotonic() + 5
    while process_start(pid) == mark:
        assert time.monotonic() < deadline, "the orphan goes on"
        time.sleep(0.02)


def test_it_ends_a_process_whose_starter_is_killed() -> None:
    starter = start("import time; print(1, flush=True); time.sleep(30)")
    read_pid(starter)
    child = start(CHILD, "60", str(starter.pid))
    read_pid(child)
    time.sleep(0.2)
    assert child.poll() is None
    finish(starter)
    assert child.wait(5) == EXIT_ORPHANED
    finish(child)


def test_it_ends_a_process_whose_lease_expires() -> None:
    child = start(CHILD, "0.3")
    read_pid(child)
    assert child.wait(5) == EXIT_ORPHANED
    finish(child)


def test_a_renewed_lease_holds() -> None:
    reasons: list[str] = []
    dog = Watchdog(1.0, (os.getpid(),), period_s=0.02, end=reasons.append)
    for _ in range(25):
        time.sleep(0.05)
        dog.renew()
    assert reasons == []
    wait_until(lambda: len(reasons) == 1)
    assert "lease" in reasons[0]
    dog.stop()


def test_time_in_which_it_stood_still_itself_is_no_silence() -> None:
    child = start(CHILD, "0.6")
    pid = read_pid(child)
    time.sleep(0.1)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(pid, signal.SIGCONT)
    continued_at = time.monotonic()
    assert child.wait(5) == EXIT_ORPHANED
    assert time.monotonic() - continued_at > 0.2  # not at once: nobody could have renewed it meanwhile
    finish(child)


def test_a_pid_is_no_proof_of_the_same_process() -> None:
    process = start("import time; print(1, flush=True); time.sleep(30)")
    read_pid(process)
    assert process_start(process.pid) is not None
    assert process_start(process.pid) != process_start(os.getpid())
    process.kill()
    time.sleep(0.1)
    assert process_start(process.pid) is None  # a zombie is dead
    finish(process)
    assert process_start(process.pid) is None


@pytest.mark.parametrize("pid", [2**22 + 5])
def test_a_starter_that_was_never_there_counts_as_gone(pid: int) -> None:
    reasons: list[str] = []
    dog = Watchdog(60.0, (pid,), period_s=0.02, end=reasons.append)
    time.sleep(0.2)
    dog.stop()
    assert len(reasons) == 1
