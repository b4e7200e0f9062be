"""A model's forward pass as something that stops wherever ranks must add up their parts.

A computation yields this rank's partial sum and is sent the sum over all ranks. So a model says once what it
computes, and whoever runs it decides how the sums are made: not at all where there is one rank, one after the
other, or one half of the batch's while the other half computes.

    half 0   attention   | sum |   mlp         | sum |   attention
    half 1               attention   | sum |   mlp         | sum |
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ellm.worker.model.shard import Shard

Computation = Generator[Tensor, Tensor, Tensor]


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


def run(computation: Computation, communicator: Communicator) -> Tensor:
    """To its end, each sum when it is asked for."""
    try:
        part = next(computation)
        while True:
            part = computation.send(communicator.begin_sum(part).wait())
    except StopIteration as end:
        result: Tensor = end.value
        return result


def run_halves(halves: tuple[Computation, Computation], communicator: Communicator) -> tuple[Tensor, Tensor]:
    """Two computations of equally many sums: the sums of each are made while the other computes."""
    pending = [communicator.begin_sum(next(half)) for half in halves]
    results: list[Tensor] = []
    while not results:
        for i, half in enumerate(halves):
            try:
                pending[i] = communicator.begin_sum(half.send(pending[i].wait()))
            except StopIteration as end:
                results.append(end.value)
    first, second = results
    return first, second
