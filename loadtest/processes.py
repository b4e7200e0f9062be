"""CPU time and memory of a server's whole process tree, by what each process is. Linux only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """What one process has used since it started."""

    pid: int
    command: str
    cpu_s: float  # user and system, its threads included, its children not
    peak_bytes: int


def process_tree(root: int) -> list[int]:
    """The process and all its descendants that are alive."""
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def process_use(pid: int) -> ProcessUse | None:
    """None when the process is gone."""
    try:
        # Ray renames its workers through their title, which is what cmdline then holds.
        command = (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        )
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    peak = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)
    return ProcessUse(pid, command, (int(fields[11]) + int(fields[12])) * TICK_S, peak)


def unique_bytes(pid: int) -> int:
    """Resident memory that no other process shares (USS), now, from smaps_rollup; 0 for one that is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Resident memory of one process now.

    `held_bytes`: what it took for itself and nothing but the process can give back: anonymous and shared
    memory, swapped out or not; what several processes share counts by its share in each. The rest of
    `resident_bytes` are pages of files, the programs and libraries that run: the system reads them in as they
    are used, drops them when it needs room, and another program that runs the same file shares them.
    """

    held_bytes: int
    resident_bytes: int


_HELD = ("Pss_Anon:", "Pss_Shmem:", "SwapPss:")


def process_memory(pid: int) -> ProcessMemory:
    """From smaps_rollup; zeros for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return ProcessMemory(0, 0)
    sizes = {words[0]: int(words[1]) * 1024 for words in map(str.split, lines[1:])}
    return ProcessMemory(sum(sizes.get(name, 0) for name in _HELD), sizes.get("Rss:", 0))


def tree_use(root: int) -> dict[int, ProcessUse]:
    """Use of every process below `root`, by pid."""
    uses = (process_use(pid) for pid in process_tree(root))
    return {use.pid: use for use in uses if use is not None}


def label(command: str) -> str:
    """A short name of what the process is."""
    if "haproxy" in command.split(" ", 1)[0]:
        return "haproxy"
    if command.startswith("ray::"):
        return command[len("ray::") :].split("(")[0].split(" ")[0].strip() or "ray worker"
    for mark in (
        "gcs_server",
        "raylet/raylet",
        "dashboard",
        "log_monitor",
        "runtime_env_agent",
        "resource_tracker",
        "autoscaler",
    ):
        if mark in command:
            return mark.split("/")[-1]
    return "driver" if "ellm" in command else command.split(" ")[0].rsplit("/", 1)[-1]


def spent_by_label(before: dict[int, ProcessUse], after: dict[int, ProcessUse]) -> dict[str, float]:
    """CPU seconds between two looks, summed over processes of one label."""
    spent: dict[str, float] = {}
    for pid, use in after.items():
        start = before[pid].cpu_s if pid in before else 0.0
        spent[label(use.command)] = spent.get(label(use.command), 0.0) + use.cpu_s - start
    return spent
