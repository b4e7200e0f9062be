"""Which body runs the operations on a device.

The numba body is the CPU's where numba can be used: it alone gives STRICT there. The Triton body is a GPU's
where its kernels can be compiled for it. torch's is everywhere.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform

import torch

from ellm.kernels.ops import Ops
from ellm.kernels.reference import TorchOps

log = logging.getLogger(__name__)

LEAST_CAPABILITY = 8  # of a GPU: bfloat16 in its matrix units
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


def triton_problem(device: str) -> str | None:
    """Why the Triton kernels cannot be used on a torch device, or None. The interpreter stands for a GPU."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'ellm-on-ray[gpu]')"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.partition(":")[0] != "cuda" or not torch.cuda.is_available():
        return f"the Triton kernels need a GPU, or their interpreter (TRITON_INTERPRET=1), not {device!r}"
    if torch.version.hip is not None:
        return "the Triton kernels have only been compiled for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if major < LEAST_CAPABILITY:
        return (
            f"the Triton kernels need compute capability {LEAST_CAPABILITY}.0, this GPU has {major}.{minor}"
        )
    return None


def triton_body(device: str, *, deterministic: bool = False, fused: bool = False) -> Ops:
    """The Triton body by name: also on a CPU, where its kernels are interpreted (TRITON_INTERPRET=1, slow).

    deterministic: STRICT. fused: rows of a hole and decode rows share a launch of attention.
    Raises ValueError where it cannot be had.
    """
    problem = triton_problem(device)
    if problem:
        raise ValueError(problem)
    from ellm.kernels.triton_ops import TritonOps

    return TritonOps(device, deterministic=deterministic, fused=fused)


def select(
    device: str, *, jit: bool | None = None, deterministic: bool | None = None, fused: bool = False
) -> Ops:
    """The body for a torch device ("cpu", "cuda", "cuda:1").

    jit: None takes numba (Triton on a GPU) where it can be used, True insists on numba, False refuses both.
    deterministic: True insists on STRICT; None takes it where the body gives it; False does without, where
    that is faster, as None does on a GPU.
    fused: on a GPU rows of a hole and decode rows share a launch of attention.
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
    if not on_cpu and jit is not False:
        return _gpu_ops(device, deterministic=bool(deterministic), fused=fused)
    if deterministic:
        needed = "the numba kernels" if on_cpu else "the Triton kernels"
        raise ValueError(f"deterministic=True cannot be had on {device!r} without {needed}")
    if problem and deterministic is None:
        log.warning("%s: %s", problem, NO_STRICT)
    return TorchOps()


def _gpu_ops(device: str, *, deterministic: bool, fused: bool) -> Ops:
    problem = triton_problem(device)
    if problem is None:
        return triton_body(device, deterministic=deterministic, fused=fused)
    if deterministic:
        raise ValueError(f"deterministic=True cannot be had on {device!r}: {problem}")
    if torch.cuda.is_available():
        log.warning("%s: torch's operations take their place, which are slower", problem)
    return TorchOps()
