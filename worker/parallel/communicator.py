"""Sums and gathers of a step's tensors over the ranks, by gloo on a CPU and NCCL on a GPU.

A ring adds the parts of an element in an order that depends on where it lies in the message: from three
ranks on the sum of a row depends on its company. There under STRICT, and for small messages on a CPU where
it is faster, every rank therefore gets all parts and adds them in the order of ranks, in float32. On a GPU
STRICT does so with two ranks, too: NCCL adds half types in different ways, and chooses by a message's size.

The GPU's way has not run on several GPUs yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ellm.worker.model.computation import PendingSum
from ellm.worker.model.shard import Shard
from ellm.worker.parallel.group import Group

_distributed: Any = dist

SMALL_BYTES = 1 << 19  # up to here one exchange beats the two rounds of a ring


class _Sum:
    """An all-reduce in place."""

    def __init__(self, owner: GroupCommunicator, work: Any, part: Tensor) -> None:
        self._owner, self._work, self._part = owner, work, part

    def wait(self) -> Tensor:
        self._owner.wait(self._work)
        return self._part


class _OrderedSum:
    """All parts, added by this rank."""

    def __init__(self, owner: GroupCommunicator, work: Any, parts: Tensor) -> None:
        self._owner, self._work, self._parts = owner, work, parts  # [ranks, ...]

    def wait(self) -> Tensor:
        self._owner.wait(self._work)
        first, *others = self._parts.unbind(0)
        total = first if first.dtype == torch.float32 else first.float()
        for other in others:
            total.add_(other)
        return total.to(first.dtype)


class _Queued:
    """Work on a GPU: to wait is to let the current stream wait, and takes no time limit."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, timeout: timedelta) -> object:
        return self._work.wait()


class GroupCommunicator:
    """Both backends have the same calls; a GPU's are queued behind what the current stream has to do, and
    `wait` there means that the stream goes on behind them."""

    def __init__(self, group: Group, backend: Callable[[], Any], *, ordered: bool, on_gpu: bool) -> None:
        """`backend`: asked for each time: whoever holds one keeps the connections of an ended group."""
        self.shard = Shard(group.rank, group.size)
        self.spent_s = 0.0  # by this rank's thread, on asking for sums and waiting for them
        self._group = group
        self._backend = backend
        # gloo adds two parts the same either way round.
        self._ordered = ordered and (on_gpu or group.size > 2)
        self._on_gpu = on_gpu
        self._small_bytes = 0 if on_gpu else SMALL_BYTES

    def begin_sum(self, part: Tensor) -> PendingSum:
        """part: any shape, the same on every rank."""
        begun = time.perf_counter()
        part = part.contiguous()
        pending: PendingSum
        if self._ordered or part.nbytes <= self._small_bytes:
            parts, work = self._begin_gather(part)
            pending = _OrderedSum(self, work, parts)
        else:
            work = self._start(lambda: self._backend().allreduce([part]))
            pending = _Sum(self, work, part)
        self.spent_s += time.perf_counter() - begun
        return pending

    def wait(self, work: Any) -> None:
        begun = time.perf_counter()
        self._group.wait(work)
        self.spent_s += time.perf_counter() - begun

    def join_columns(self, part: Tensor) -> Tensor:
        """[n, c] of every rank -> [n, size * c]."""
        parts, work = self._begin_gather(part.contiguous())
        self.wait(work)
        return parts.transpose(0, 1).reshape(part.shape[0], -1)

    def _begin_gather(self, part: Tensor) -> tuple[Tensor, Any]:
        """([ranks, ...], what to wait for)."""
        parts = part.new_empty((self.shard.size, *part.shape))
        flat = parts.view(-1, *part.shape[1:])
        return parts, self._start(lambda: self._backend()._allgather_base(flat, part))

    def _start(self, begin: Callable[[], Any]) -> Any:
        work = self._group.start(begin)
        return _Queued(work) if self._on_gpu else work


def make_communicator(group: Group, device: torch.device, *, ordered: bool) -> GroupCommunicator:
    """For tensors on `device`. Raises GroupFailed."""
    if device.type == "cpu":
        return GroupCommunicator(group, lambda: group.gloo, ordered=ordered, on_gpu=False)
    options = _distributed.ProcessGroupNCCL.Options()
    # The last resort, behind the group's own limits: it ends the whole process without a word to the others.
    timeouts = group.spec.timeouts
    options._timeout = timedelta(seconds=max(timeouts.start_s, 2 * timeouts.step_s))
    store = _distributed.PrefixStore("nccl", group.store)
    nccl = _distributed.ProcessGroupNCCL(store, group.rank, group.size, options)
    group.at_end(nccl.abort)
    return GroupCommunicator(group, lambda: nccl, ordered=ordered, on_gpu=True)
