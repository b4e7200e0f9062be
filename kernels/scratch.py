"""Working memory of the kernels, kept by each thread that launches them."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ellm.kernels.recording import current

_local = threading.local()


def scratch(num_bytes: int) -> int:
    """The address of at least `num_bytes` bytes, aligned to 64, until this thread asks again."""
    recording = current()
    if recording is not None:
        return recording.scratch(num_bytes)
    memory: Tensor | None = getattr(_local, "memory", None)
    if memory is None or memory.numel() < num_bytes + 64:
        memory = torch.empty(2 * num_bytes + 64, dtype=torch.uint8)
        _local.memory = memory
    return -(-memory.data_ptr() // 64) * 64
