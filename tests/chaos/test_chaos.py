"""A short chaos run on a real cluster of three raylets: a rank and the controller are killed, a node dies, a
worker is drained.

The long one, with every kind of fault on a real model, is `python -m ellm.loadtest.chaos`.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.needs_platform("linux")]

COMMAND = (
    "-m ellm.loadtest.chaos --name= --model simulated:overhead_s=0.02 --step-ms 20 --tokens 96 --streams 32"
    " --nodes 2 --workers 3 --pairs 0 --routers 1 --templates 16 --min-streams 8 --min-requests 100 --each 1"
    " --kinds kill_rank,kill_raylet,drain,kill_controller"
)


def test_clients_notice_a_pause_at_most() -> None:
    done = subprocess.run(
        [sys.executable, *COMMAND.split()], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert '"lost": 0' in done.stdout
    assert "4/4 " in done.stdout
