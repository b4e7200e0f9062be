"""What one rank of a worker must settle with the others; the seam between an executor and its group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ellm.worker.executor.copies import Copier
from ellm.worker.model.computation import Alone, Communicator


class Peers(Protocol):
    """The other ranks. Every rank makes the same calls in the same order; any error ends the group."""

    @property
    def size(self) -> int: ...

    def device(self, device: torch.device) -> torch.device:
        """Which of this machine's devices of that type is this rank's."""
        ...

    def communicator(self, device: torch.device, *, ordered: bool) -> Communicator:
        """For tensors on `device`. `ordered`: a row's sum may not depend on the other rows (STRICT)."""
        ...

    def agree_least(self, values: Sequence[int]) -> list[int]:
        """The least of each value over all ranks."""
        ...

    def copier(self, own: Copier, block_bytes: int) -> Copier:
        """A copy ends when every rank has made its part of it."""
        ...


class NoPeers:
    """One rank is the whole worker."""

    size = 1

    def device(self, device: torch.device) -> torch.device:
        return device

    def communicator(self, device: torch.device, *, ordered: bool) -> Communicator:
        return Alone()

    def agree_least(self, values: Sequence[int]) -> list[int]:
        return list(values)

    def copier(self, own: Copier, block_bytes: int) -> Copier:
        return own
