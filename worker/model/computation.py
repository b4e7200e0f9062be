"""A model's forward pass as something that stops wherever ranks must add up their parts, and wherever rows
meet the KV pool.

A computation yields this rank's partial sum and is sent the sum over all ranks; it yields an AttentionCall
and is sent the attention of its rows. So a model says once what it computes, and whoever runs it decides how
the sums are made: not at all where there is one rank, one after the other, or one half of the batch's while
the other half computes; and what lies between two calls can be recorded, or run ahead of other rows.

    half 0   attention   | sum |   mlp         | sum |   attention
    half 1               attention   | sum |   mlp         | sum |
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ellm.kernels.ops import HeadTransform
from ellm.worker.model.shard import Shard


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One layer's heads, yet to be normed and rotated, stored, and attended. Layers call in their order."""

    q: Tensor  # [R, H, D]; like k and v it may be a view into a wider row
    k: Tensor  # [R, K, D]
    v: Tensor  # [R, K, D]
    heads: HeadTransform
    scale: float
    window: int | None


Stop = Tensor | AttentionCall
Computation = Generator[Stop, Tensor, Tensor]
Attend = Callable[[AttentionCall], Tensor]  # stores k and v of all R rows -> [R, H, D]


class PendingSum(Protocol):
    """A sum under way."""

    def wait(self) -> Tensor:
        """The sum; it may be the memory of this rank's part."""
        ...


class Communicator(Protocol):
    """What ranks say to each other within a step. All ranks make the same calls in the same order."""

    shard: Shard

    def begin_sum(self, part: Tensor) -> PendingSum:
        """Add `part` over all ranks. Nobody touches it before `wait`."""
        ...

    def join_columns(self, part: Tensor) -> Tensor:
        """[n, c] of every rank side by side, in the order of ranks: [n, size * c]."""
        ...


class Alone:
    """One rank: its part is the whole."""

    shard = Shard()

    def begin_sum(self, part: Tensor) -> PendingSum:
        return _Done(part)

    def join_columns(self, part: Tensor) -> Tensor:
        return part


class _Done:
    def __init__(self, value: Tensor) -> None:
        self._value = value

    def wait(self) -> Tensor:
        return self._value


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """How a runner works with other ranks. From `overlap_rows` rows on a step is computed in two halves, so
    that the sums of one are made while the other computes; None: never."""

    communicator: Communicator = field(default_factory=Alone)
    overlap_rows: int | None = None


def next_sum(computation: Computation, total: Tensor | None, attend: Attend) -> Tensor:
    """On from `total`, the sum asked for last (None: from the start), to the next sum's part. Raises
    StopIteration with the result."""
    stop = next(computation) if total is None else computation.send(total)
    while isinstance(stop, AttentionCall):
        stop = computation.send(attend(stop))
    return stop


def next_call(computation: Computation, value: Tensor | None, communicator: Communicator) -> AttentionCall:
    """On from `value`, the attention asked for last (None: from the start), to the next layer's. Raises
    StopIteration with the result."""
    stop = next(computation) if value is None else computation.send(value)
    while not isinstance(stop, AttentionCall):
        stop = computation.send(communicator.begin_sum(stop).wait())
    return stop


def run(
    computation: Computation, communicator: Communicator, attend: Attend, total: Tensor | None = None
) -> Tensor:
    """To its end, each sum when it is asked for; on from `total`, where one has been asked for."""
    try:
        part = next_sum(computation, total, attend)
        while True:
            part = next_sum(computation, communicator.begin_sum(part).wait(), attend)
    except StopIteration as end:
        result: Tensor = end.value
        return result


def run_halves(
    halves: tuple[Computation, Computation], communicator: Communicator, attends: tuple[Attend, Attend]
) -> tuple[Tensor, Tensor]:
    """Two computations of equally many sums: the sums of each are made while the other computes."""
    both = tuple(zip(halves, attends, strict=True))
    pending = [communicator.begin_sum(next_sum(half, None, attend)) for half, attend in both]
    results: list[Tensor] = []
    while not results:
        for i, (half, attend) in enumerate(both):
            try:
                pending[i] = communicator.begin_sum(next_sum(half, pending[i].wait(), attend))
            except StopIteration as end:
                results.append(end.value)
    first, second = results
    return first, second
