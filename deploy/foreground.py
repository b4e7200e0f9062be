"""`ellm serve` as the terminal sees it: a small process in front of the one that drives Ray.

The driver runs in a process group of its own, so that Ctrl-C, a hangup and a SIGTERM to the group reach this
process alone and not Ray's, which would fall over each other. The first signal asks the driver for an orderly
end, the second ends everything at once. When the driver is gone, however it went, so is all that it started.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import types

from ellm.deploy import server
from ellm.deploy.leftovers import Session
from ellm.deploy.tree import EllmConfig
from ellm.worker.api.errors import EllmError

INTERRUPTED = 130
SAME_S = 0.5  # `make` passes on a signal that the whole group has had
GRACE_S = 5.0  # for what the driver has ended to be gone


def serve(config: EllmConfig) -> int:
    """Hold a cluster up until a signal; returns the exit code. Raises ConfigError before anything starts."""
    server.check(config)
    session = Session()
    sys.stdout.flush()
    sys.stderr.flush()
    # From before the fork until its handlers stand, each side keeps what comes for later.
    signal.pthread_sigmask(signal.SIG_BLOCK, server.SIGNALS)
    here = os.getpid()
    driver = os.fork()  # no threads and no Ray yet
    if driver == 0:
        os._exit(_drive(config, here))
    session.adopt_orphans()
    asked = _forward_signals(driver, session)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, server.SIGNALS)
    status = _wait_for(driver)
    killed = session.end(GRACE_S)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        print(f"ellm serve: the cluster fell ({signal.Signals(-code).name})", file=sys.stderr)
        return 1
    if killed and not asked:
        print(f"ellm serve: had to end {', '.join(killed)}", file=sys.stderr)
    return code


def _wait_for(driver: int) -> int:
    """Its exit status; adopted orphans that end before it are cleared away."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == driver:
            return status


def _drive(config: EllmConfig, parent: int) -> int:
    """In the driver: the exit code, whatever happens."""
    os.setpgrp()
    try:
        return server.run(config, parent)
    except EllmError as error:
        print(f"ellm serve: {error.message}", file=sys.stderr)
    except Exception:  # the edge of the process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 1


def _forward_signals(driver: int, session: Session) -> list[float]:
    """Install the handlers; the list holds when the first signal came."""
    asked: list[float] = []

    def on_signal(number: int, frame: types.FrameType | None) -> None:
        now = time.monotonic()
        if not asked:
            asked.append(now)
            os.kill(driver, signal.SIGINT)
        elif now - asked[0] > SAME_S:
            os.kill(driver, signal.SIGKILL)
            session.end(0.0)
            os._exit(INTERRUPTED)

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, on_signal)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, on_signal)
    return asked
