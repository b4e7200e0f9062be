"""The Serve config that ships, on a real Ray cluster: deployed, changed under load, and a node emptied.

The long one, on the model that ships, is `python -m ellm.loadtest.rollout`.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

COMMAND = "-m ellm.loadtest.rollout --name= --model simulated:overhead_s=0.02 --streams 8 --changes 1"


def test_no_request_is_lost() -> None:
    done = subprocess.run(
        [sys.executable, *COMMAND.split()], capture_output=True, text=True, timeout=840, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for phase in ("undisturbed", "change 1", "node emptied", "afterwards"):
        assert f'"phase": "{phase}"' in done.stdout
    assert ", 0 failed" in done.stdout
