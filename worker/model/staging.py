"""How small host arrays reach the device that computes, and how results come back, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

# What is smaller travels with the command itself; of larger memory the driver waits until it has been read,
# unless it is pinned.
INLINE_BYTES = 1 << 16


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor on `device`; on a CPU it shares the array's memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    if array.nbytes > INLINE_BYTES:
        tensor = tensor.pin_memory()  # from a pool that keeps it until the copy has ended
    return tensor.to(device, non_blocking=True)


class ToHost:
    """Tensors of one device on their way from it, behind all that its current stream has been asked for. Of
    none only the end of that."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = tensors
        if device.type != "cpu":
            self._tensors = [_pinned_like(tensor).copy_(tensor, non_blocking=True) for tensor in tensors]
            # Whoever waits for it sleeps.
            self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    @property
    def there(self) -> bool:
        """Whether `wait` returns at once."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> Sequence[Tensor]:
        """On the CPU. Waits for nothing that was asked for later; from any thread."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


def _pinned_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
