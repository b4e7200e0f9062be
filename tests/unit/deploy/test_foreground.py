"""The moments around the fork of `ellm serve`: a signal is not lost in them, and a lost parent is noticed.

The processes, signals and handlers are the real ones; Ray is left out, and the fork is made to take long.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

PROGRAM = """
import os, signal, sys, time
from ellm.deploy import foreground, server
from ellm.deploy.tree import EllmConfig
from ellm.worker.api.errors import WorkerFailed

fork = os.fork
def slow_fork():
    pid = fork()
    if pid:
        print("forked", flush=True)
    time.sleep(0.5)
    return pid

def lost(pid, number, kill=os.kill):
    if number != signal.SIGINT:
        kill(pid, number)
    elif "once" in sys.argv:
        os.kill = kill

os.fork = slow_fork
if "lost" in sys.argv:
    os.kill = lost
server.check = lambda config: None
server.start_ray = lambda config, progress: time.sleep(float(sys.argv[1]))
def start_application(config, progress):
    if "falls" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    if "fails" in sys.argv:
        raise WorkerFailed("no room")

server.start_application = start_application
server.announce = server.take_down = lambda config: None
sys.exit(foreground.serve(EllmConfig()))
"""

START_S = 120.0
WAIT_S = 60.0  # of which an idle machine takes two


@contextmanager
def forked(start_s: float, *also: str) -> Iterator[subprocess.Popen[str]]:
    """`ellm serve` in the middle of its fork."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(start_s), *also],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "forked\n"
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_a_signal_that_comes_before_the_handlers_stand_is_not_lost() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with forked(START_S) as process:
            os.killpg(process.pid, number)
            output, _ = process.communicate(timeout=WAIT_S)
            assert process.returncode == 130, output
            assert "Stopped" in output
            assert "Traceback" not in output


def test_a_driver_that_did_not_heed_the_first_signal_is_asked_again() -> None:
    with forked(START_S, "lost", "once") as process:
        os.kill(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 130, output
        assert "Stopped" in output


def test_a_second_signal_ends_all_at_once() -> None:
    with forked(START_S, "lost") as process:
        for _ in range(30):  # the driver hears nothing; and would end by itself with code 0
            if process.poll() is None:
                os.kill(process.pid, signal.SIGTERM)
                time.sleep(0.7)  # later than the same signal passed on
        output, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 130, output
        assert "Stopped" not in output


def test_what_becomes_of_the_driver_is_said() -> None:
    with forked(0.0, "falls") as process:
        output, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 1
        assert "the cluster fell (SIGKILL)" in output
    with forked(0.0, "fails") as process:
        output, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 1
        assert "ellm serve: no room" in output


def test_a_driver_whose_parent_died_before_it_looked_ends() -> None:
    with forked(start_s=0.0) as process:
        process.kill()
        output, _ = process.communicate(timeout=WAIT_S)  # until the driver has let go of it too
        assert "Stopped" in output
