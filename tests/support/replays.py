"""What CUDA graphs do, without a GPU: each replay computes anew, into the memory of the first time."""

from __future__ import annotations

from collections.abc import Callable

from ellm.loadtest.gpu import observed
from ellm.worker.model.graphs import Replay


class CallAgain(observed.CallAgain):
    """`error`: raised by everything that is captured. Counts what is."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error
        self.num_captured = 0

    def capture(self, call: Callable[[], object]) -> Replay:
        if self._error is not None:
            raise self._error
        self.num_captured += 1
        return super().capture(call)
