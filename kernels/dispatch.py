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
    deterministic: None is STRICT where the body can, True insists, False allows faster paths that are not.
    Raises ValueError where a thing insisted on cannot be had.
    """
    kind = device.partition(":")[0]
    if jit and kind != "cpu":
        raise ValueError(f"jit=True: numba kernels run on a CPU, not on {device!r}")
    if jit and not has_numba():
        raise ValueError("jit=True, but numba is not installed (pip install 'ellm-on-ray[jit]')")
    if deterministic:
        raise ValueError(f"deterministic=True cannot be had on {device!r} with these settings")
    if kind == "cpu" and jit is None and not has_numba() and deterministic is None:
        log.warning(
            "numba is not installed: slower attention, and no STRICT (results may depend on the batch)"
        )
    return TorchOps()
