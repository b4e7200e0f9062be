"""What recorded steps take of a device: foreseen from a few of them, taken from the pool, compared after."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import golden
from support.checkpoints import write_checkpoint
from support.replays import CallAgain
from torch import Tensor

from ellm.worker.api.errors import ConfigError
from ellm.worker.executor import recording
from ellm.worker.executor.local import LocalExecutor
from ellm.worker.executor.recording import SAMPLED, Usage, foresee, taken
from ellm.worker.model.graphs import DecodeSizes, Replay
from ellm.worker.model.pieces import piece_rows

MIB = 1 << 20
LAYERS = 3
AVAILABLE = 400 * MIB
GRAPH_BYTES, SHARED_BYTES = 3 * MIB, 5 * MIB


class Graphs:
    """The first takes 100 bytes, the others 7 each."""

    def __init__(self, num_sizes: int, freed: int = 0) -> None:
        self.num_sizes = num_sizes
        self.recorded = 0
        self._freed = freed

    def record_largest(self, count: int) -> None:
        assert self.recorded < count <= self.num_sizes
        self.recorded = count

    @property
    def bytes(self) -> int:
        return self.recorded and 100 - self._freed * self.recorded + 7 * (self.recorded - 1)


@pytest.mark.parametrize(
    ("sizes", "freed", "expected"),
    [
        ((1,), 0, 100),
        ((2,), 0, 107),
        ((40,), 0, 100 + 7 * 39),
        ((40, 3), 0, 100 + 7 * 39 + 100 + 7 * 2),
        ((40,), 200, 0),  # others give memory back meanwhile
    ],
)
def test_a_few_stand_for_all(sizes: tuple[int, ...], freed: int, expected: int) -> None:
    kinds = [Graphs(n, freed) for n in sizes]

    def in_use() -> Usage:
        num_bytes = 1000 + sum(kind.bytes for kind in kinds)
        return Usage(num_bytes, num_bytes)

    assert foresee(kinds, in_use, 50) == expected
    assert [kind.recorded for kind in kinds] == [min(n, 1 + SAMPLED) for n in sizes]


@pytest.mark.parametrize(
    ("allocated", "device", "expected"),
    [
        (700, 700, 700),
        (700, 740, 740),  # the driver keeps 40
        (700, 9_000_700, 800),  # a neighbour has come
        (700, -9_000_000, 700),  # one has left
        (-50, 20, 70),  # a little was given back meanwhile
    ],
)
def test_a_neighbour_on_the_device_disturbs_little(allocated: int, device: int, expected: int) -> None:
    assert taken(Usage(5_000, 80_000), Usage(5_000 + allocated, 80_000 + device), 100) == expected


class Device:
    """Full of what was before, and of the graphs of every recorder that is still there."""

    def __init__(self) -> None:
        self._recorders: weakref.WeakSet[Recorder] = weakref.WeakSet()
        self.num_made = 0
        self.later_bytes = 0  # that a graph takes more when there is a pool
        self.neighbour_bytes = 0
        self.has_neighbour = False

    def recorder(self, device: torch.device) -> Recorder:
        made = Recorder(GRAPH_BYTES + (self.later_bytes if self.num_made else 0))
        self.num_made += 1
        self._recorders.add(made)
        return made

    def bytes_in_use(self, device: torch.device) -> Usage:
        """Its neighbour comes and goes."""
        gc.collect()
        self.neighbour_bytes = 200 * MIB - self.neighbour_bytes
        seen = sum(one.bytes for one in self._recorders)
        return Usage(seen, seen + 100 * MIB + (self.neighbour_bytes if self.has_neighbour else 0))


class Recorder(CallAgain):
    def __init__(self, graph_bytes: int) -> None:
        super().__init__()
        self._graph_bytes = graph_bytes

    def record(self, call: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        self.num_captured += 1
        return super().record(call)

    @property
    def bytes(self) -> int:
        return self.num_captured and SHARED_BYTES + self.num_captured * self._graph_bytes


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(recording, "graph_problem", lambda *_: None)
    monkeypatch.setattr(recording, "CudaRecorder", made.recorder)
    monkeypatch.setattr(recording, "bytes_in_use", made.bytes_in_use)
    monkeypatch.setattr("ellm.worker.executor.rank.available_bytes", lambda device: AVAILABLE)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    write_checkpoint(made, "llama", num_hidden_layers=LAYERS)
    return made


def load(folder: Path, **worker: Any) -> LocalExecutor:
    config = golden.config(folder, jit=False, **worker)
    cache = replace(config.cache, num_blocks=None, max_pool_bytes=1 << 40, memory_fraction=0.5)
    return LocalExecutor.load(replace(config, cache=cache))


@pytest.mark.parametrize("rows", [0, 64])
def test_the_pool_leaves_room_for_what_is_recorded(
    folder: Path, device: Device, rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    executor = load(folder, cuda_graphs=True, cuda_graph_rows=rows)
    chains = len(piece_rows(rows))
    assert (len(DecodeSizes.up_to(8, 512).rows), chains) == (4, 3 if rows else 0)
    memory = dict(executor.limits.memory)
    assert memory["CUDA graphs"] == SHARED_BYTES + (4 + chains * (LAYERS + 1)) * GRAPH_BYTES
    taken = sum(memory[what] for what in ("weights", "activations of the largest step", "CUDA graphs"))
    free = AVAILABLE // 2 // 2 - taken
    assert memory["KV pool"] == free // memory["KV block"] * memory["KV block"]
    assert device.num_made == 2, "once to see what they take, once for good"
    assert device.bytes_in_use(torch.device("cpu")).allocated == memory["CUDA graphs"]
    assert "more than was foreseen" not in caplog.text
    executor.close()


def test_a_neighbour_that_grows_is_not_taken_for_graphs(folder: Path, device: Device) -> None:
    device.has_neighbour = True
    executor = load(folder, cuda_graphs=True)
    of_graphs = dict(executor.limits.memory)["CUDA graphs"]
    own = SHARED_BYTES + 4 * GRAPH_BYTES
    assert own <= of_graphs <= own + 4 * LAYERS * recording.DRIVER_LAYER_BYTES
    executor.close()


def test_what_takes_more_than_was_foreseen_is_said(
    folder: Path, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    device.later_bytes = 2 * MIB
    load(folder, cuda_graphs=True).close()
    (message,) = (r.getMessage() for r in caplog.records if r.name.endswith("recording"))
    assert message.startswith("CUDA graphs take 25 MiB, 8 MiB more than was foreseen: lower cache.memory")


def test_a_device_that_is_full_while_steps_are_recorded_is_said_in_words(
    folder: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("ellm.worker.model.graphs.DecodeGraphs.record_all", full)
    with pytest.raises(ConfigError, match="too little memory while steps are recorded: lower cache"):
        load(folder, cuda_graphs=True)


def test_nothing_is_set_aside_where_nothing_is_recorded(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    executor = golden.executor(folder, jit=False, cuda_graphs=True)
    assert "CUDA graphs" not in dict(executor.limits.memory)
    assert "CUDA graphs need a GPU, not cpu" in caplog.text
    executor.close()
