"""`make setup` before it downloads anything: what it refuses, and that a second run does nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from support.tree import ROOT

# Stands for an interpreter: answers the three questions that setup asks.
FAKE = """#!/bin/bash
case "$*" in
  --version) echo "Python {version}" ;;
  *version_info*) exit {old} ;;
  *ensurepip*) exit {bare} ;;
  *) echo "called with $*" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files that setup reads, and nothing installed."""
    for name in ("pyproject.toml", "constraints.txt", "deploy/setup.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def python(tree: Path, version: str = "3.11.2", *, old: int = 0, bare: int = 0) -> str:
    path = tree / "python"
    path.write_text(FAKE.format(version=version, old=old, bare=bare))
    path.chmod(0o755)
    return str(path)


def setup(tree: Path, interpreter: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHON": interpreter}
    return subprocess.run([tree / "deploy/setup.sh"], env=environ, capture_output=True, text=True, timeout=60)


def test_an_old_python_is_refused_in_one_line(tree: Path) -> None:
    done = setup(tree, python(tree, "3.9.18", old=1))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "Python 3.9.18 is too old: Python 3.11 or newer is needed" in line


def test_a_bare_python_is_refused_in_one_line(tree: Path) -> None:
    done = setup(tree, python(tree, bare=1))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "apt install python3-venv" in line
    assert not (tree / ".venv").exists()


def test_no_python_is_refused_in_one_line(tree: Path) -> None:
    done = setup(tree, "no-such-python")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "no-such-python not found" in line


def test_a_failure_shows_the_end_of_the_log(tree: Path) -> None:
    done = setup(tree, python(tree))
    assert done.returncode == 1
    assert "[1/4] virtual environment" in done.stdout
    assert "called with -m venv .venv" in done.stderr
    assert "the whole log is .venv/setup.log" in done.stderr


def test_what_is_installed_is_not_installed_again(tree: Path) -> None:
    installed = tree / ".venv/bin/ellm"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    installed.chmod(0o755)
    stamp = subprocess.run(
        "cat pyproject.toml constraints.txt deploy/setup.sh | cksum",
        shell=True,
        cwd=tree,
        capture_output=True,
    )
    (tree / ".venv/.setup").write_bytes(stamp.stdout)
    start = time.monotonic()
    assert setup(tree, "no-such-python").returncode == 0
    assert time.monotonic() - start < 2.0
    with (tree / "constraints.txt").open("a") as file:  # a changed pin is installed
        file.write("another==1.0\n")
    assert setup(tree, "no-such-python").returncode == 1


def test_pins_are_plain(tree: Path) -> None:
    lines = (tree / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 50
    for pin in pins:
        name, equals, version = pin.partition("==")
        assert name, pin
        assert equals, pin
        assert version, pin
        assert not set(pin) & set(" /@+"), pin
    assert len({pin.partition("==")[0].lower() for pin in pins}) == len(pins)
