"""What CUDA graphs do, without a GPU: each replay computes anew, into the memory of the first time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

from ellm.loadtest.gpu import observed
from ellm.worker.executor import recording
from ellm.worker.model.graphs import NotRecorded, Replay


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


class _Listed(CallAgain):
    """Lists what it records and how often that is replayed; from `fails_at` on nothing can be recorded."""

    def __init__(self, fails_at: int | None) -> None:
        super().__init__()
        self.sizes: list[object] = []
        self.num_replays = 0
        self._fails_at = fails_at

    def record(self, call: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        replay, out = super().record(call)
        self._next(list(out.shape))
        return self._counted(replay), out

    def capture(self, call: Callable[[], object]) -> Replay:
        replay = super().capture(call)
        self._next("piece")
        return self._counted(replay)

    def _next(self, size: object) -> None:
        """All ranks have run it by now."""
        if self._fails_at is not None and len(self.sizes) >= self._fails_at:
            raise NotRecorded("this device records no more")
        self.sizes.append(size)

    def _counted(self, replay: Replay) -> Replay:
        def counted() -> None:
            self.num_replays += 1
            replay()

        return counted


@dataclass(frozen=True, slots=True)
class ReplayingRanks:
    """Around a rank (support/ranks.py): its steps are recorded and replayed, as far as they can be without a
    GPU, and what was is written to `folder`/RANK.json. `failing`: a rank, and after how many records it
    fails; `unable`: one that says that it cannot record at all."""

    folder: Path
    failing: tuple[int, int] | None = None
    unable: int | None = None

    @contextlib.contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        made: list[_Listed] = []

        def recorder(device: object) -> _Listed:
            fails = self.failing is not None and self.failing[0] == rank
            made.append(_Listed(self.failing[1] if fails and self.failing is not None else None))
            return made[-1]

        problem = "this rank has no Triton" if rank == self.unable else None
        nothing = recording.Usage(0, 0)
        with (
            patch.object(recording, "graph_problem", lambda *_: problem),
            patch.object(recording, "CudaRecorder", recorder),
            patch.object(recording, "bytes_in_use", lambda _: nothing),
        ):
            yield
        told = [{"sizes": one.sizes, "replays": one.num_replays} for one in made]
        (self.folder / f"{rank}.json").write_text(json.dumps(told))

    def told(self, size: int) -> list[list[dict[str, object]]]:
        """Of each rank: what each of its recorders recorded, and how often that was replayed."""
        return [json.loads((self.folder / f"{rank}.json").read_text()) for rank in range(size)]
