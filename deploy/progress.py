"""What a person sees while a cluster starts: a line per phase with its time, and a spinner on a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
PERIOD_S = 0.1
# Where there is no terminal, a phase that goes on says so now and then.
QUIET_PERIOD_S = 10.0


class Progress:
    """Phases one after the other; `note` says how far the present one is."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = sys.stdout if out is None else out
        self._tty = self._out.isatty()
        self._start = time.monotonic()
        self._phase_start = self._start
        self._text = ""
        self._note = ""
        self._lock = threading.Lock()
        self._idle = threading.Event()
        self.times: dict[str, float] = {}  # phase -> seconds

    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    @contextmanager
    def phase(self, text: str) -> Iterator[Progress]:
        """Show `text` while the block runs, and a line after it that says how it went."""
        self._text, self._note, self._phase_start = text, "", time.monotonic()
        stop = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(stop,), daemon=True)
        ticker.start()
        try:
            yield self
        except BaseException:
            stop.set()
            ticker.join()
            self._clear()
            self.line(f"{text}: not finished")
            raise
        stop.set()
        ticker.join()
        seconds = time.monotonic() - self._phase_start
        self.times[text] = seconds
        self._clear()
        self.line(f"{text}{': ' + self._note if self._note else ''} ({seconds:.1f} s)")

    def note(self, text: str) -> None:
        """How far the phase is; the last note stands in its finished line."""
        self._note = text

    def line(self, text: str) -> None:
        """One line of its own, with the time since the start."""
        with self._lock:
            self._out.write(f"[{self.elapsed_s():5.1f} s] {text}\n")
            self._out.flush()

    def _tick(self, stop: threading.Event) -> None:
        period = PERIOD_S if self._tty else QUIET_PERIOD_S
        count = 0
        while not stop.wait(period):
            text = f"{self._text}{': ' + self._note if self._note else ''}"
            if self._tty:
                with self._lock:
                    turn = SPINNER[count % len(SPINNER)]
                    self._out.write(f"\r\033[K{turn} {self.elapsed_s():5.1f} s  {text}")
                    self._out.flush()
            else:
                self.line(f"{text} ...")
            count += 1

    def _clear(self) -> None:
        if self._tty:
            with self._lock:
                self._out.write("\r\033[K")
                self._out.flush()
