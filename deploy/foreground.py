"""`ellm serve` as the terminal sees it: a small process in front of the one that drives Ray.

The driver runs in a process group of its own, so that Ctrl-C, a hangup and a SIGTERM to the group reach this
process alone and not Ray's, which would fall over each other. The first signal asks the driver for an orderly
end, the second ends everything at once. When the driver is gone, however it went, so is all that it started.

The signals stay blocked and are waited for together with the driver's end, so that none is lost between a
look and the wait after it; once a second it looks anyway, should a thread of some library have taken one.
The driver has no such wait, and is asked twice.
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
LOOK_S = 1.0
AGAIN_S = 1.0  # Python heeds a signal that came on the way into a long system call only after that call
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
    driver = os.fork()  # no Ray yet, nor threads that compute
    if driver == 0:
        os._exit(_drive(config, here))
    session.adopt_orphans()
    signals = _Signals(driver, session)
    status = signals.wait()
    killed = session.end(GRACE_S)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        print(f"ellm serve: the cluster fell ({signal.Signals(-code).name})", file=sys.stderr)
        return 1
    if killed and signals.first is None:
        print(f"ellm serve: had to end {', '.join(killed)}", file=sys.stderr)
    return code


def _drive(config: EllmConfig, parent: int) -> int:
    """In the driver: the exit code, whatever happens."""
    os.setpgrp()
    try:
        return server.run(config, parent)
    except EllmError as error:
        print(f"ellm serve: {error.message}", file=sys.stderr)
    except BaseException:  # the edge of the process, which is a copy of the one before it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 1


class _Signals:
    """What comes while the driver runs, and after it."""

    def __init__(self, driver: int, session: Session) -> None:
        self.first: float | None = None  # when the first one came that asks for an end
        self._asked_again = False
        self._driver: int | None = driver
        self._session = session
        self._names = {signal.SIGINT, signal.SIGTERM}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            self._names.add(signal.SIGHUP)
        for name in self._names:
            signal.signal(name, self._on_signal)
        for name in (signal.SIGCHLD, signal.SIGALRM):
            signal.signal(name, _nothing)
        self._waited = self._names | {signal.SIGCHLD, signal.SIGALRM}
        signal.pthread_sigmask(signal.SIG_BLOCK, self._waited)
        signal.setitimer(signal.ITIMER_REAL, LOOK_S, LOOK_S)

    def wait(self) -> int:
        """The driver's exit status; from then on the signals come by themselves."""
        while (status := self._reap()) is None:
            number = signal.sigwait(self._waited)
            if number in self._names:
                self._on_signal(number, None)
            elif number == signal.SIGALRM:
                self._ask_again()
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*server.SIGNALS, *self._waited})
        return status

    def _reap(self) -> int | None:
        """Clear away who has ended: the driver's status, if it is among them, else an adopted orphan's is
        nobody's."""
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == self._driver:
                self._driver = None
                return ended[1]
        return None

    def _ask(self) -> None:
        if self._driver is not None:
            os.kill(self._driver, signal.SIGINT)

    def _ask_again(self) -> None:
        if self.first is not None and not self._asked_again and time.monotonic() - self.first >= AGAIN_S:
            self._asked_again = True
            self._ask()

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = now
            self._ask()
        elif now - self.first > SAME_S:
            if self._driver is not None:
                os.kill(self._driver, signal.SIGKILL)
            self._session.end(0.0)
            os._exit(INTERRUPTED)


def _nothing(number: int, frame: types.FrameType | None) -> None:
    """A signal that is only waited for still needs a handler, or some systems drop it."""
