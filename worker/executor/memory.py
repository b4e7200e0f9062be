"""How much memory there is, and how much a piece of work took at its peak. Measures; decides nothing."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_KIB = 1024


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken on `device`: on a CPU the lesser of the system's and the container's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_system_available(), _cgroup_available())


def _system_available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: half of what is built in
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return next(int(line.split()[1]) * _KIB for line in lines if line.startswith("MemAvailable:"))


def _cgroup_available() -> int:
    """What the container's limit leaves; file pages it holds can be reclaimed and do not count."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return 1 << 62
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return 1 << 62


def _status_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * _KIB for line in lines if line.startswith(f"{key}:")), None)


class PeakMemory:
    """Bytes above the level at construction that were in use at the highest point until `read`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._base = torch.cuda.memory_allocated(device)
            return
        # Reset the process's high-water mark; where that is refused the mark of its whole life stands in,
        # which is never too low.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._base = _status_bytes("VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB

    def read(self) -> int:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device) - self._base
        peak = _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
        return max(0, peak - self._base)
