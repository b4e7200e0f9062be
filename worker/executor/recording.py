"""Steps recorded at start, and the memory that this takes: foreseen before the pool is sized, checked after.

Graphs hold the addresses of the pool, so they are recorded when there is one; what they take must be known
before. So a few of them are recorded on the small pool of the warm-up, measured, and thrown away. The ranks
of a group do all of this together.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ellm.kernels.ops import Ops
from ellm.worker.api.config import WorkerConfig
from ellm.worker.executor.pool_size import mib
from ellm.worker.model.computation import Communicator
from ellm.worker.model.graphs import (
    CudaRecorder,
    DecodeGraphs,
    DecodeSizes,
    RanksRecorder,
    Recorder,
    graph_problem,
)
from ellm.worker.model.loader import Progress
from ellm.worker.model.pieces import PieceGraphs, piece_rows
from ellm.worker.model.runner import ModelRunner

log = logging.getLogger(__name__)

SAMPLED = 4  # after the largest, which alone takes memory for what is computed; the rest costs each the same
# Of what the driver itself keeps for the launches of a recorded layer: no figure beyond it is believed.
DRIVER_LAYER_BYTES = 1 << 19


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of a device in use, without what torch keeps for later."""

    allocated: int  # by this process's tensors, and by its graphs for theirs
    device: int  # by anybody


class Recorded(Protocol):
    """Graphs of one kind of step."""

    @property
    def num_sizes(self) -> int: ...

    def record_largest(self, count: int) -> None:
        """So many of all sizes, the largest first, but for those that are recorded."""
        ...


def taken(before: Usage, after: Usage, most_unseen: int) -> int:
    """Bytes that were taken in between. What the driver keeps is seen in the whole device's figure alone,
    which other processes change: of that at most `most_unseen`."""
    seen = after.allocated - before.allocated
    unseen = after.device - before.device - seen
    return max(0, seen) + min(max(0, unseen), most_unseen)


def foresee(kinds: Sequence[Recorded], in_use: Callable[[], Usage], size_bytes: int) -> int:
    """Bytes for all sizes of each kind, from a few of them. `size_bytes`: the most that one takes unseen."""
    total = 0
    for kind in kinds:
        before = in_use()
        kind.record_largest(1)
        first = in_use()
        total += taken(before, first, size_bytes)
        sampled = min(SAMPLED, kind.num_sizes - 1)
        if sampled:
            kind.record_largest(1 + sampled)
            more = taken(first, in_use(), sampled * size_bytes)
            total += -(-more * (kind.num_sizes - 1) // sampled)
    return total


@dataclass(frozen=True, slots=True)
class StepRecording:
    """How one rank records its steps. `agree`: whether something is so on all ranks."""

    config: WorkerConfig
    communicator: Communicator
    agree: Callable[[bool], bool]

    def possible(self, ops: Ops, device: torch.device) -> bool:
        """Whether steps are to be recorded, and can be on every rank; says why not where they cannot."""
        if not self.config.cuda_graphs:
            return False
        problem = graph_problem(ops, device)
        if self.agree(problem is None):
            return True
        log.warning("cuda_graphs: %s", problem or "another rank cannot record steps")
        return False

    def foreseen_bytes(self, runner: ModelRunner, max_model_len: int) -> int:
        """Of the device, that recording all will take. `runner`: with any pool, which is written to."""
        device = runner.cache.device
        kinds = self._graphs_of(runner, max_model_len)
        total = foresee(kinds, lambda: bytes_in_use(device), _size_bytes(runner))
        kinds.clear()
        bytes_in_use(device)  # gives back what they held
        return total

    def record(self, runner: ModelRunner, max_model_len: int, foreseen: int, progress: Progress) -> None:
        """Let the runner replay its steps. `foreseen`: bytes that are left for it."""
        device = runner.cache.device
        before, sizes = bytes_in_use(device), 0
        for graphs in self._graphs_of(runner, max_model_len):
            kind = "recording decode steps" if isinstance(graphs, DecodeGraphs) else "recording mixed steps"
            progress(kind, 0.0)
            graphs.record_all()
            if isinstance(graphs, DecodeGraphs):
                runner.replay(graphs)
            else:
                runner.replay_pieces(graphs)
            progress(kind, 1.0)
            sizes += graphs.num_sizes
        _compare(taken(before, bytes_in_use(device), sizes * _size_bytes(runner)), foreseen)

    def _graphs_of(self, runner: ModelRunner, max_model_len: int) -> list[DecodeGraphs | PieceGraphs]:
        config, cache, model = self.config, runner.cache, runner.model
        recorder: Recorder = CudaRecorder(cache.device)
        if self.communicator.shard.size > 1:
            recorder = RanksRecorder(recorder, self.agree)
        sizes = DecodeSizes.up_to(config.scheduler.max_num_seqs, max_model_len)
        decode = DecodeGraphs(model, runner.ops, cache, sizes, self.communicator, recorder)
        rows = piece_rows(min(config.cuda_graph_rows, config.scheduler.max_step_tokens))
        if not rows:
            return [decode]
        pieces = PieceGraphs(model, cache.num_layers, rows, cache.device, self.communicator, recorder)
        return [decode, pieces]


def _size_bytes(runner: ModelRunner) -> int:
    return runner.cache.num_layers * DRIVER_LAYER_BYTES


def _compare(num_bytes: int, foreseen: int) -> None:
    log.info("CUDA graphs take %s, %s were foreseen", mib(num_bytes), mib(foreseen))
    if num_bytes > foreseen:
        log.warning(
            "CUDA graphs take %s, %s more than was foreseen: lower cache.memory_fraction if memory runs out",
            mib(num_bytes),
            mib(num_bytes - foreseen),
        )


def bytes_in_use(device: torch.device) -> Usage:
    """Now, with nothing under way."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return Usage(torch.cuda.memory_reserved(device), total - free)
