"""How long a call takes on a device, and what every result file says of the machine."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from ellm.loadtest.result import git_commit

REPEATS = 11
CALLS = 10  # queued at once, so that launching them does not count


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call: the median of several runs after one warm-up, which compiles."""
    call()
    if device.type != "cuda":
        begin = perf_counter()
        call()
        return perf_counter() - begin
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize(device)
        begin = perf_counter()
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize(device)
        times.append((perf_counter() - begin) / CALLS)
    return median(times)


def copy_rate(device: torch.device, mib: int) -> float:
    """Bytes read and written per second by a plain copy of `mib` MiB on the device."""
    source = torch.zeros(mib << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device)


def aim(what: str, figure: float, least: float) -> dict[str, Any]:
    """What a figure should be at least, and whether it is."""
    return {"what": what, "figure": figure, "least": least, "met": figure >= least}


def beside(what: str, figure: float) -> dict[str, Any]:
    """A figure that nothing is asked of."""
    return {"what": what, "figure": figure, "least": None, "met": None}


def unmeasured(what: str, reason: object) -> dict[str, Any]:
    """What should have been measured, and why it was not."""
    return {"what": what, "figure": None, "least": None, "met": None, "reason": str(reason)}


def write(path: str, device: torch.device, arguments: dict[str, Any], **found: Any) -> None:
    """One JSON file: device, versions, commit, command and arguments (the seed is one, or 0), what was found.
    `aims`: as `aim`, `beside` and `unmeasured` make them."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    versions = {"torch": torch.__version__, "triton": _version("triton"), "cuda": torch.version.cuda}
    made = {"date": date.today().isoformat(), "commit": _commit(), "command": " ".join(sys.argv)}
    plain = {key: value if _is_plain(value) else str(value) for key, value in arguments.items()}
    result = {"device": name, **versions, **made, "arguments": {"seed": 0} | plain, **found}
    Path(path).write_text(json.dumps(result, indent=1))


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _commit() -> str:
    try:
        return git_commit()
    except OSError:  # no git on this machine
        return os.environ.get("COMMIT", "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
