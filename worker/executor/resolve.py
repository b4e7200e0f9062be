"""Turns "auto" into what this machine and this checkpoint allow: device, dtype, context length, body."""

from __future__ import annotations

import torch

from ellm.kernels import dispatch
from ellm.kernels.ops import Ops
from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.engine.plan import HoleWay
from ellm.worker.model.architecture import Architecture


def resolve_device(name: str) -> torch.device:
    """For "auto" a GPU where there is one. Raises ConfigError for a device this machine lacks."""
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    if name == "cuda" and not has_cuda:
        raise ConfigError("device cuda was asked for and this machine has none", param="model.device")
    return torch.device(name)


def resolve_dtype(name: str, arch: Architecture, device: torch.device) -> torch.dtype:
    """What "auto" means: on a CPU float32, exact; on a GPU the checkpoint's half precision, bfloat16 for a
    float32 one. Raises ConfigError for float16 on a CPU, where no body has it."""
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return {"float16": torch.float16}.get(arch.dtype, torch.bfloat16)
    if name == "float16" and device.type == "cpu":
        raise ConfigError("float16 is not supported on a CPU; use bfloat16 or float32", param="model.dtype")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def resolve_max_model_len(asked: int | None, arch: Architecture) -> int:
    """Tokens. Raises ConfigError when more is asked than the checkpoint has positions for."""
    if asked is None:
        return arch.max_model_len
    if not 2 <= asked <= arch.max_model_len:
        raise ConfigError(
            f"max_model_len = {asked}: this checkpoint allows 2 to {arch.max_model_len}",
            param="model.max_model_len",
        )
    return asked


def select_ops(config: WorkerConfig, device: torch.device) -> Ops:
    """The body that computes. Raises ConfigError where a setting asks for what cannot be had."""
    model = config.model
    try:
        return dispatch.select(
            str(device),
            jit=model.jit,
            deterministic=model.deterministic,
            fused=config.fused_attention != "off",
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def can_tape(config: WorkerConfig, ops: Ops) -> bool:
    """Whether decode steps are to be taped: kernels of numba, whose results no other rank waits for."""
    return config.decode_tapes and ops.name == "numba" and config.tensor_parallel_size == 1


def hole_ways(config: WorkerConfig, ops: Ops) -> tuple[HoleWay, ...]:
    """How rows of holes may run beside the others; the first where nobody chooses. Empty where there are no
    holes.

    "on" leaves no choice; "auto" adds a way, and the brain measures. With STRICT a shared launch is not
    chosen by time: that a row has the same bits there has been shown under the interpreter alone.
    """
    if not config.cache.transient_blocks:
        return ()
    fused = config.fused_attention if ops.name == "triton" else "off"
    ahead = config.recompute_ahead
    if ahead == "on":
        return ("ahead",)
    ways: list[HoleWay] = ["fused"] if fused == "on" else ["apart"]
    if fused == "auto" and not ops.deterministic:
        ways.append("fused")
    if ahead == "auto":
        ways.append("ahead")
    return tuple(ways)
