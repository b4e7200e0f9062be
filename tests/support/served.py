"""`ellm serve` as a user starts it: a process of its own, its output, and everything that hangs from it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

START_S = 240.0  # on a machine that is busy with other things
ELLM = str(Path(sys.executable).with_name("ellm"))
MARK = "ELLM_TEST_MARK"


class Served:
    """One running server. Every process below it carries a mark in its environment, orphans too."""

    def __init__(self, *words: str) -> None:
        self.mark = uuid.uuid4().hex
        self.lines: list[str] = []
        self._below: set[psutil.Process] = set()
        self.process = subprocess.Popen(
            [ELLM, "serve", *words],
            env={**os.environ, MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # signals to the group reach all that a terminal's Ctrl-C would reach
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for_line(self, pattern: str, timeout_s: float = START_S) -> re.Match[str]:
        """The first line of its output that matches."""
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self.process.poll() is not None
            for line in list(self.lines):
                if match := re.search(pattern, line):
                    return match
            assert not ended, f"ended with {self.process.returncode}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {pattern!r} in {timeout_s} s:\n{self.output}"
            time.sleep(0.05)

    def wait_until_ready(self) -> str:
        """Its URL."""
        url = self.wait_for_line(r"^Ready: (http://\S+)$").group(1)
        self._look()
        return url

    def signal(self, number: signal.Signals) -> None:
        """To the whole process group, as a terminal does."""
        self._look()
        os.killpg(self.process.pid, number)

    def wait(self, timeout_s: float = 120.0) -> int:
        """Its exit code."""
        code = self.process.wait(timeout_s)
        self._reader.join(10.0)
        return code

    def _look(self) -> None:
        """Remember what hangs from it now: some of Ray's processes write over their environment."""
        with contextlib.suppress(psutil.Error):
            self._below.update(psutil.Process(self.process.pid).children(recursive=True))

    def processes(self) -> list[str]:
        """All that live below it, and it itself."""
        self._look()
        found = set()
        for process in self._below:
            with contextlib.suppress(psutil.Error):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found.add(f"{process.pid} {process.name()}")
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark:
                    found.add(f"{process.pid} {process.name()}")
        return sorted(found)

    def end(self) -> None:
        """Whatever state it is in: nothing is left."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10.0)
        for line in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line.split()[0]), signal.SIGKILL)
        self._reader.join(10.0)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._reader.join(10.0)
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextlib.contextmanager
def served(*words: str) -> Iterator[Served]:
    server = Served(*words)
    try:
        yield server
    finally:
        server.end()


def wait_for(condition: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain"
        time.sleep(0.1)
