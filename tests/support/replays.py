"""What CUDA graphs do, without a GPU: each replay computes anew, into the memory of the first time."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ellm.worker.model.graphs import Replay


class CallAgain:
    """`error`: raised by everything that is asked to be recorded."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error
        self.num_captured = 0

    def record(self, call: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        out = call().clone()

        def replay() -> None:
            out.copy_(call())

        return replay, out

    def warm(self, call: Callable[[], object]) -> None:
        call()

    def capture(self, call: Callable[[], object]) -> Replay:
        if self._error is not None:
            raise self._error
        self.num_captured += 1
        call()

        def replay() -> None:
            call()

        return replay
