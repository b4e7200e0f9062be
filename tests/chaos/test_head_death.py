"""The control store of a real cluster is killed and comes back, then its whole head node; clients read on.

The long one, on a real model, is `python -m ellm.loadtest.head_death`.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.ray,
    pytest.mark.needs_platform("linux"),
    pytest.mark.needs_tool("redis-server"),
]

COMMAND = "-m ellm.loadtest.head_death --name= --model simulated:overhead_s=0.02 --step-ms 20 --tokens 96"


def test_requests_outlive_the_head_node() -> None:
    done = subprocess.run(
        [sys.executable, *COMMAND.split(), "--streams", "24", "--down-s", "5"],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    verdict = json.loads(done.stdout[done.stdout.index("{") :])
    assert len(verdict["rows"]) == 3
    for row in verdict["rows"]:
        assert (row["lost"], row["corrupted"]) == (0, 0)
        assert row["requests"] >= 50
    assert verdict["workers went on"]
