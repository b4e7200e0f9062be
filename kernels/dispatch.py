"""Which body runs the operations on a device.

The numba body is the CPU's where numba is installed: it alone gives STRICT there. torch's is everywhere.
"""

from __future__ import annotations

import importlib.util
import logging

from ellm.kernels.ops import Ops
from ellm.kernels.reference import TorchOps

log = logging.getLogger(__name__)

NO_JIT = "numba is not installed: slower attention, and results may depend on the batch (no STRICT)"


def has_numba() -> bool:
    """Whether the JIT can be imported."""
    return importlib.util.find_spec("numba") is not None


def select(device: str, *, jit: bool | None = None, deterministic: bool | None = None) -> Ops:
    """The body for a torch device ("cpu", "cuda", "cuda:1").

    jit: None takes numba where it is present, True insists on it, False refuses it.
    deterministic: True insists on STRICT; None takes it where the body gives it; False is content without.
    Raises ValueError where a thing insisted on cannot be had.
    """
    on_cpu = device.partition(":")[0] == "cpu"
    if jit and not on_cpu:
        raise ValueError(f"jit=True: the numba kernels run on a CPU, not on {device!r}")
    if jit and not has_numba():
        raise ValueError("jit=True, but numba is not installed (pip install 'ellm-on-ray[jit]')")
    if on_cpu and jit is not False and has_numba():
        from ellm.kernels.numba_ops import NumbaOps

        return NumbaOps()
    if deterministic:
        raise ValueError(f"deterministic=True cannot be had on {device!r} without the numba kernels")
    if on_cpu and jit is None and deterministic is None:
        log.warning(NO_JIT)
    return TorchOps()
