"""The result file of a benchmark: what was run, on what, and the figures. Knows nothing of any benchmark.

`rows` is what docs/benchmarks.md shows, one flat dict a row; `raw` keeps every single measurement. A row may
carry `ratio` and `ratio SOMETHING` (ours divided by `against`): under 1 it is listed among the losses.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "numba", "numpy", "ray", "triton")

Row = dict[str, Any]


@dataclass(slots=True)
class Result:
    """One run of one benchmark."""

    name: str  # the slug of its file
    title: str
    about: str  # what is measured and how, in a few sentences
    command: str  # makes it again
    rows: list[Row]
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    raw: Any = None
    device: str = field(default_factory=lambda: device_name())
    versions: dict[str, str] = field(default_factory=lambda: package_versions())
    commit: str = field(default_factory=lambda: git_commit())
    date: str = field(default_factory=lambda: date.today().isoformat())

    def write(self, folder: Path = RESULTS) -> Path:
        """Write `<date>-<name>.json`; the same day's run of the same benchmark is replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.date}-{self.name}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path


def device_name() -> str:
    """Processor, cores this process may use, and memory."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {gib:.0f} GiB"


def package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str:
    """Short hash of the checkout, with `+` where files differ from it; empty outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return commit + ("+" if commit and changed else "")


def command_line(module: str) -> str:
    """The command that is running now, as a reader would type it."""
    return " ".join(["python -m", module, *sys.argv[1:]])
