"""Which body runs the operations on a device.

The numba body is the CPU's where numba can be used: it alone gives STRICT there. torch's is everywhere.
"""

from __future__ import annotations

import importlib.util
import logging
import platform

from ellm.kernels.ops import Ops
from ellm.kernels.reference import TorchOps

log = logging.getLogger(__name__)

NO_STRICT = "slower attention, and results may depend on the batch (no STRICT)"


def jit_problem() -> str | None:
    """Why the numba kernels cannot be used on this machine, or None."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install 'ellm-on-ray[jit]')"
    if platform.machine() in ("x86_64", "AMD64"):
        from llvmlite.binding import get_host_cpu_features

        features = get_host_cpu_features()
        if not (features.get("fma") and features.get("f16c")):
            return "this CPU has no FMA or F16C instructions"
    return None


def has_numba() -> bool:
    """Whether the numba kernels can be used on this machine."""
    return jit_problem() is None


def select(device: str, *, jit: bool | None = None, deterministic: bool | None = None) -> Ops:
    """The body for a torch device ("cpu", "cuda", "cuda:1").

    jit: None takes numba where it can be used, True insists on it, False refuses it.
    deterministic: True insists on STRICT; None takes it where the body gives it; False does without, where
    that is faster.
    Raises ValueError where a thing insisted on cannot be had.
    """
    on_cpu = device.partition(":")[0] == "cpu"
    if jit and not on_cpu:
        raise ValueError(f"jit=True: the numba kernels run on a CPU, not on {device!r}")
    problem = jit_problem() if on_cpu and jit is not False else None
    if jit and problem:
        raise ValueError(f"jit=True, but {problem}")
    if on_cpu and jit is not False and not problem:
        from ellm.kernels.numba_ops import NumbaOps

        return NumbaOps(deterministic=deterministic is not False)
    if deterministic:
        raise ValueError(f"deterministic=True cannot be had on {device!r} without the numba kernels")
    if problem and deterministic is None:
        log.warning("%s: %s", problem, NO_STRICT)
    return TorchOps()
