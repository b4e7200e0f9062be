"""How long `ellm serve` takes to be ready, and the memory of each of its processes.

    python -m ellm.loadtest.serve_start [--runs 2] [--workers 2]

Runs the command as a user would, on the model that ships, waits for "Ready", streams a completion on each
worker at least, and ends it by SIGINT. Whatever the command has started must then be gone: this process
adopts its orphans, so that none can hide. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

from ellm.loadtest.processes import label, process_tree, tree_use, unique_bytes
from ellm.loadtest.result import Result, Row, command_line
from ellm.loadtest.sse_client import stream

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
POLL_S = 0.5
STOP_S = 90.0
GONE_S = 5.0  # for what has been told to end
ROLES = {
    "ServeReplica:ellm:Router": "router",
    "ServeReplica:ellm:Worker": "supervisor",
    "RankActor": "rank",
    "gcs_server": "gcs",
}
FIRST = ("command", "driver", "router", "supervisor", "rank", "haproxy")  # the others by size

ABOUT = """\
`ellm serve --workers {workers}` on the bundled model, from the command to its "Ready" line; then a
completion, four a worker at once, and SIGINT until the command has ended. After every run it is checked
that no process is left. Peak RSS is the kernel's high-water mark, in which memory that processes share
counts for each of them; own is what none shares (USS), read while serving. Processes that ended during the
start are counted too."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2, help="one after the other")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--port", type=int, default=8165)
    parser.add_argument("--name", default="serve-start", help="slug of the result file")
    return parser.parse_args()


def role_of(command: str, is_root: bool) -> str:
    """What a process of the server is, by its command line."""
    name = label(command)
    if is_root:
        return "command"
    if command.startswith("ray::"):
        name = name.split(".")[0]  # an actor's title goes on with the method that it runs
    return ROLES.get(name, name)


class Memory:
    """Peak memory of all processes below one, those included that ended meanwhile."""

    def __init__(self, root: int) -> None:
        self._root = root
        self.roles: dict[int, str] = {}  # pid -> its last role; Ray's workers take theirs after their start
        self.peak: dict[int, int] = {}  # resident, in bytes, by pid
        self.unique: dict[int, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while not self._stop.wait(POLL_S):
            self.look()

    def look(self) -> None:
        for pid, use in tree_use(self._root).items():
            if use.command:  # none: it is just ending
                self.roles[pid] = role_of(use.command, pid == self._root)
                self.peak[pid] = max(self.peak.get(pid, 0), use.peak_bytes)

    def look_for_unique(self) -> None:
        """The largest seen; it costs the processes time, so that it is not read while they start."""
        for pid in process_tree(self._root):
            self.unique[pid] = max(self.unique.get(pid, 0), unique_bytes(pid))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def wait_ready(process: subprocess.Popen[str], start: float) -> tuple[float, list[str]]:
    """Seconds from the command to its "Ready" line, and what it said until then."""
    assert process.stdout is not None
    said: list[str] = []
    for line in process.stdout:
        if re.match(r"Ready: http", line):
            ready_s = time.monotonic() - start
            threading.Thread(target=process.stdout.read, daemon=True).start()  # so that it never blocks
            return ready_s, said
        print(f"  {line}", end="", flush=True)
        said.append(line.rstrip())
    raise RuntimeError("the server ended before it was ready:\n" + "\n".join(said))


async def first_token_s(port: int, streams: int) -> list[float]:
    """So many completions at once; seconds to the first token of each."""
    bodies: list[dict[str, Any]] = [
        {"prompt": f"def function_{i}(", "max_tokens": 32, "ignore_eos": True, "stream": True}
        for i in range(streams)
    ]
    results = await asyncio.gather(*(stream("127.0.0.1", port, "/v1/completions", body) for body in bodies))
    assert all(result.status == 200 and result.done for result in results), "a stream did not end well"
    return [result.arrivals[0] - result.sent_at for result in results]


def left_over() -> list[str]:
    """What still runs below this process after a grace, by command line; what ended is cleared away."""
    deadline = time.monotonic() + GONE_S
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return []
        if time.monotonic() > deadline:
            uses = tree_use(os.getpid())
            return [use.command for pid, use in uses.items() if pid != os.getpid()]
        time.sleep(0.05)


def stop(process: subprocess.Popen[str]) -> float:
    """Seconds from SIGINT to its end. Raises RuntimeError if it does not end well or leaves something."""
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    try:
        code = process.wait(timeout=STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise RuntimeError(f"it did not end within {STOP_S:g} s") from None
    stop_s = time.monotonic() - start
    if left := left_over():
        raise RuntimeError("left behind:\n" + "\n".join(left))
    if code != 0:
        raise RuntimeError(f"exit code {code} after SIGINT")
    return stop_s


def one_run(workers: int, port: int) -> dict[str, Any]:
    """Start, ask, stop; times in seconds and the processes' memory in bytes."""
    command = [
        sys.executable,
        "-m",
        "ellm.deploy.cli",
        "serve",
        "--workers",
        str(workers),
        "--port",
        str(port),
    ]
    load = os.getloadavg()[0]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    memory = Memory(process.pid)
    try:
        ready_s, said = wait_ready(process, start)
        first = asyncio.run(first_token_s(port, 1))[0]
        asyncio.run(first_token_s(port, 4 * workers))
        memory.look_for_unique()
        memory.look()
    finally:
        memory.stop()
        stop_s = stop(process)
    processes = [
        {"role": role, "peak_bytes": memory.peak[pid], "unique_bytes": memory.unique.get(pid, 0)}
        for pid, role in memory.roles.items()
    ]
    return {
        "load_before": load,
        "ready_s": ready_s,
        "first_token_s": first,
        "stop_s": stop_s,
        "said": said,
        "processes": processes,
    }


def of_role(run: dict[str, Any], role: str, key: str) -> list[float]:
    """MiB of each of a role's processes."""
    return [process[key] / 2**20 for process in run["processes"] if process["role"] == role]


def rows_of(runs: list[dict[str, Any]]) -> list[Row]:
    """One row a role, and one of the whole; medians of the runs."""
    roles = {process["role"] for run in runs for process in run["processes"]}
    rows: list[Row] = []
    for role in roles:
        peaks = [of_role(run, role, "peak_bytes") for run in runs]
        rows.append(
            {
                "role": role,
                "processes": statistics.median_high(len(peak) for peak in peaks),
                "largest, peak RSS MiB": statistics.median(max(peak, default=0.0) for peak in peaks),
                "all, peak RSS MiB": statistics.median(sum(peak) for peak in peaks),
                "all, own MiB": statistics.median(sum(of_role(run, role, "unique_bytes")) for run in runs),
            }
        )
    rows.sort(key=lambda row: -row["all, peak RSS MiB"])
    rows.sort(key=lambda row: FIRST.index(row["role"]) if row["role"] in FIRST else len(FIRST))
    whole: Row = {"role": "the whole", "processes": sum(row["processes"] for row in rows)}
    whole["all, peak RSS MiB"] = sum(row["all, peak RSS MiB"] for row in rows)
    whole["all, own MiB"] = sum(row["all, own MiB"] for row in rows)
    whole["ready, s"] = statistics.median(run["ready_s"] for run in runs)
    whole["first token, ms"] = 1e3 * statistics.median(run["first_token_s"] for run in runs)
    whole["gone, s"] = statistics.median(run["stop_s"] for run in runs)
    return [whole, *rows]


def main() -> int:
    arguments = parse()
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("cannot adopt orphans")
    runs = []
    for index in range(arguments.runs):
        runs.append(one_run(arguments.workers, arguments.port))
        print(
            f"run {index + 1}: ready after {runs[-1]['ready_s']:.1f} s, gone {runs[-1]['stop_s']:.1f} s later"
        )
    each = ", ".join(
        f"{run['ready_s']:.1f} s (load average before it {run['load_before']:.1f})" for run in runs
    )
    result = Result(
        name=arguments.name,
        title="Start of `ellm serve`, and its memory",
        about=ABOUT.format(workers=arguments.workers),
        command=command_line("ellm.loadtest.serve_start"),
        rows=rows_of(runs),
        notes=[f"ready after {each}, one run after the other"],
        raw={"runs": runs},
    )
    print(f"wrote {result.write()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
