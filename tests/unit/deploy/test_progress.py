"""The lines of a start: plain where they go to a file, alive on a terminal."""

from __future__ import annotations

import io
import re
import time

import pytest

from ellm.deploy import progress
from ellm.deploy.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_phase_ends_in_one_line_with_its_last_note() -> None:
    out = io.StringIO()
    shown = Progress(out)
    with shown.phase("Ray") as phase:
        phase.note("starting")
        phase.note("a local cluster")
    shown.line("  a remark")
    first, second = out.getvalue().splitlines()
    assert re.fullmatch(r"\[ +\d+\.\d s\] Ray: a local cluster \(\d+\.\d s\)", first)
    assert re.fullmatch(r"\[ +\d+\.\d s\]   a remark", second)
    assert set(shown.times) == {"Ray"}


def test_a_long_phase_says_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_PERIOD_S", 0.05)
    out = io.StringIO()
    shown = Progress(out)
    with shown.phase("Workers") as phase:
        phase.note("loading 50 %")
        time.sleep(0.2)
    lines = out.getvalue().splitlines()
    assert len(lines) >= 2
    assert lines[0].endswith("Workers: loading 50 % ...")


def test_a_terminal_gets_a_spinner_and_a_clean_line() -> None:
    out = Terminal()
    shown = Progress(out)
    with shown.phase("Ray"):
        time.sleep(0.25)
    text = out.getvalue()
    assert any(turn in text for turn in progress.SPINNER)
    assert re.search(r"\r\033\[K\[ +\d+\.\d s\] Ray \(\d+\.\d s\)\n$", text)


def test_a_failed_phase_is_not_called_done() -> None:
    out = io.StringIO()
    with pytest.raises(ValueError, match="no"), Progress(out).phase("Ray"):
        raise ValueError("no")
    (line,) = out.getvalue().splitlines()
    assert line.endswith("Ray: not finished")
