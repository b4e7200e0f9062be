"""Rows of a hole one layer ahead of all other rows: they fill the next layer's bank of transient blocks while
the others read this layer's.

    rows of holes   layer 0 | layer 1 | layer 2 | layer 3
    all other rows          | layer 0 | layer 1 | layer 2 | layer 3
    bank            0         1         0         1

Rows of a hole read nothing that other rows of the step write, so all that orders the two is the pool: the
other rows of a layer wait for its stores, and the stores of layer l + 2, which go to the same bank, for what
reads layer l. On a GPU the two have a stream each; elsewhere the same order runs on one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ellm.worker.engine.plan import BatchPlan, PlanEntry
from ellm.worker.model.computation import Communicator, Computation, next_call
from ellm.worker.model.kv_cache import NUM_BANKS
from ellm.worker.model.layers import PoolAttention

Mark = Any  # a point in what a lane has been asked for


class Lanes(Protocol):
    """Two queues of a device's work: the main one and, within `ahead`, another."""

    def ahead(self) -> AbstractContextManager[object]:
        """What is asked for within goes to the other queue."""
        ...

    def mark(self) -> Mark:
        """The end of what the queue has been asked for so far."""
        ...

    def wait(self, mark: Mark) -> None:
        """What the queue is asked for from now on runs after the mark."""
        ...


class OneLane:
    """One thread: everything runs in the order in which it is asked for."""

    def ahead(self) -> AbstractContextManager[object]:
        return nullcontext()

    def mark(self) -> Mark:
        return None

    def wait(self, mark: Mark) -> None:
        del mark


class CudaLanes:
    """The current stream and one beside it. Memory made within `ahead` belongs to the stream beside."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def ahead(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = torch.cuda.stream(self._side)
        return context

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, mark: Mark) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)


def lanes_of(device: torch.device) -> Lanes:
    return CudaLanes(device) if device.type == "cuda" else OneLane()


def sides(plan: BatchPlan, num_blocks: int, block_size: int) -> npt.NDArray[np.int64] | None:
    """0 for each entry, 1 for those of holes. None where nothing can run ahead: no such entry, no other, or
    one that reads transient blocks which something else fills."""
    again = [entry for entry in plan.entries if entry.recompute]
    if not again or len(again) == len(plan.entries):
        return None
    if any(_reads_others(entry, num_blocks, block_size) for entry in again):
        return None
    return np.array([entry.recompute for entry in plan.entries], dtype=np.int64)


def _reads_others(entry: PlanEntry, num_blocks: int, block_size: int) -> bool:
    before: Sequence[int] = entry.block_ids[: entry.start // block_size]
    return any(block >= num_blocks for block in before)


def run_ahead(
    others: tuple[Computation, PoolAttention],
    again: tuple[Computation, PoolAttention],
    num_layers: int,
    lanes: Lanes,
    communicator: Communicator,
) -> Tensor:
    """The result of `others`, each layer of which reads what the same layer of `again` stores. Ranks make the
    sums of both in one order; a sum waits for what was asked for before it alone: none waits in vain."""
    (computation, attend), (before, attend_before) = others, again
    stored: list[Mark] = []
    read: list[Mark] = []
    begin = lanes.mark()  # the inputs
    ahead: Tensor | None = None
    value: Tensor | None = None

    def run_layer(layer: int) -> Tensor | None:
        call = next_call(before, ahead, communicator)
        if layer >= NUM_BANKS:
            lanes.wait(read[layer - NUM_BANKS])
        if layer + 1 < num_layers:
            out = attend_before(call)
        else:  # nobody reads what comes after the last layer's keys and values
            attend_before.store(call)
            out = None
        stored.append(lanes.mark())
        return out

    with lanes.ahead():
        lanes.wait(begin)
        ahead = run_layer(0)
    for layer in range(num_layers):
        if layer + 1 < num_layers:
            with lanes.ahead():
                ahead = run_layer(layer + 1)
        call = next_call(computation, value, communicator)
        lanes.wait(stored[layer])
        value = attend(call)
        read.append(lanes.mark())
    before.close()
    assert value is not None
    return _finish(computation, value, communicator)


def _finish(computation: Computation, value: Tensor, communicator: Communicator) -> Tensor:
    try:
        next_call(computation, value, communicator)
    except StopIteration as end:
        result: Tensor = end.value
        return result
    raise AssertionError("a model with more layers than its pool has")
