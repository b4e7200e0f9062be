"""A session's processes are found wherever they hang in the tree, and ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from support.processes import process_alive

from ellm.deploy.leftovers import MARK, Session

ORPHAN = """
import subprocess, sys
null = subprocess.DEVNULL
command = [sys.executable, "-c", sys.argv[1]]
child = subprocess.Popen(command, start_new_session=True, stdout=null, stderr=null)
print(child.pid, flush=True)
"""
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


@pytest.fixture
def session() -> Iterator[Session]:
    made = Session()
    yield made
    made.end(0.0)
    os.environ.pop(MARK, None)


def orphan(code: str) -> int:
    """A process whose parent is gone, in a session of its own."""
    done = subprocess.run([sys.executable, "-c", ORPHAN, code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_an_orphan_is_found_and_killed(session: Session) -> None:
    pid = orphan(STUBBORN)
    deadline = time.monotonic() + 10.0
    while not (found := session.processes()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [process.pid for process in found] == [pid]
    killed = session.end(0.1)
    assert len(killed) == 1
    assert str(pid) in killed[0]
    assert session.processes() == []
    assert not process_alive(pid)


NAMELESS = """
import json, os, subprocess, sys, time
from ellm.deploy.leftovers import Session

session = Session()
session.adopt_orphans()
command = [sys.executable, "-c", sys.argv[1], sys.argv[2]]
pid = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
found = [process.pid for process in session.processes()]
killed = session.end(0.1)
print(json.dumps([pid, found, killed, [process.pid for process in session.processes()]]))
"""


@pytest.mark.needs_platform("linux")  # where orphans are adopted
def test_an_orphan_that_shows_no_environment_is_found_by_its_descent() -> None:
    bare = ORPHAN.replace("start_new_session=True", "start_new_session=True, env={}")
    command = [sys.executable, "-c", NAMELESS, bare, STUBBORN]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    pid, found, killed, left = json.loads(done.stdout)
    assert found == [pid]
    assert len(killed) == 1
    assert str(pid) in killed[0]
    assert left == []
    assert not process_alive(pid)


def test_who_ends_in_time_is_not_killed(session: Session) -> None:
    orphan("import time; time.sleep(0.3)")
    start = time.monotonic()
    assert session.end(10.0) == []
    assert time.monotonic() - start < 8.0


def test_others_are_left_alone(session: Session) -> None:
    environ = {name: value for name, value in os.environ.items() if name != MARK}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=environ) as other:
        try:
            assert session.processes() == []
            assert session.end(0.0) == []
            assert other.poll() is None
        finally:
            other.kill()
