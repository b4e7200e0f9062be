"""A group as an executor's peers."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import torch

from ellm.worker.api.errors import ConfigError
from ellm.worker.executor.copies import Copier
from ellm.worker.model.computation import Communicator
from ellm.worker.parallel.communicator import GroupCommunicator, make_communicator
from ellm.worker.parallel.copies import GroupCopier
from ellm.worker.parallel.group import Group


class GroupPeers:
    """See executor/peers.py."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._communicators: list[GroupCommunicator] = []

    @property
    def size(self) -> int:
        return self._group.size

    def device(self, device: torch.device) -> torch.device:
        """A rank that sees one GPU has that one; of several, ranks take one each. Raises ConfigError where
        two have the same: NCCL would refuse it later, in its own words."""
        if device.type != "cuda":
            return device
        group = self._group
        own = torch.device("cuda", group.rank % torch.cuda.device_count())
        torch.cuda.set_device(own)
        mark = -1 - _number_of(own)
        marks = group.agree_least([mark if rank == group.rank else 0 for rank in range(group.size)])
        same = [rank for rank, other in enumerate(marks) if other == mark]
        if len(same) > 1:
            raise ConfigError(
                f"ranks {', '.join(map(str, same))} have the same GPU: tensor_parallel_size = {group.size} "
                f"needs {group.size} GPUs",
                param="tensor_parallel_size",
            )
        return own

    def communicator(self, device: torch.device, *, ordered: bool) -> Communicator:
        made = make_communicator(self._group, device, ordered=ordered)
        self._communicators.append(made)
        return made

    @property
    def communication_s(self) -> float:
        """Of this rank's steps so far, spent on asking for sums and waiting for them; on a CPU."""
        return sum(one.spent_s for one in self._communicators)

    def agree_least(self, values: Sequence[int]) -> list[int]:
        return self._group.agree_least(values)

    def copier(self, own: Copier, block_bytes: int) -> Copier:
        return GroupCopier(self._group, own, block_bytes)


def _number_of(gpu: torch.device) -> int:
    """Of this GPU wherever it is seen, in 56 bits."""
    uuid = str(torch.cuda.get_device_properties(gpu).uuid)
    return int.from_bytes(sha256(uuid.encode()).digest()[:7], "little")
