"""Steps recorded at start, and the memory that this takes: foreseen before the pool is sized, checked after.

Graphs hold the addresses of the pool, so they are recorded when there is one; what they take must be known
before. So a few of them are recorded on the small pool of the warm-up, measured, and thrown away.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from ellm.kernels.ops import Ops
from ellm.worker.api.config import WorkerConfig
from ellm.worker.executor.pool_size import mib
from ellm.worker.model.computation import Communicator
from ellm.worker.model.graphs import CudaRecorder, DecodeGraphs, DecodeSizes, Recorder, graph_problem
from ellm.worker.model.loader import Progress
from ellm.worker.model.pieces import PieceGraphs, piece_rows
from ellm.worker.model.runner import ModelRunner

log = logging.getLogger(__name__)

SAMPLED = 4  # after the largest, which alone takes memory for what is computed; the rest costs each the same


class Recorded(Protocol):
    """Graphs of one kind of step."""

    @property
    def num_sizes(self) -> int: ...

    def record_largest(self, count: int) -> None:
        """So many of all sizes, the largest first, but for those that are recorded."""
        ...


def recordable(config: WorkerConfig, ops: Ops, device: torch.device, num_ranks: int) -> bool:
    """Whether steps are to be recorded, and can be; says why not where they cannot."""
    if not config.cuda_graphs:
        return False
    problem = graph_problem(ops, device, num_ranks)
    if problem:
        log.warning("cuda_graphs: %s", problem)
    return problem is None


def foreseen_bytes(
    config: WorkerConfig, runner: ModelRunner, max_model_len: int, communicator: Communicator
) -> int:
    """Of the device, that recording all will take. `runner`: with any pool, which is written to."""
    device = runner.cache.device
    decode, pieces = _graphs_of(config, runner, max_model_len, communicator)
    kinds: list[Recorded] = [decode] if pieces is None else [decode, pieces]
    del decode, pieces
    total = foresee(kinds, lambda: bytes_in_use(device))
    kinds.clear()
    bytes_in_use(device)  # gives back what they held
    return total


def foresee(kinds: Sequence[Recorded], in_use: Callable[[], int]) -> int:
    """Bytes for all sizes of each kind, from a few of them."""
    total = 0
    for kind in kinds:
        before = in_use()
        kind.record_largest(1)
        first = in_use()
        total += max(0, first - before)
        sampled = min(SAMPLED, kind.num_sizes - 1)
        if sampled:
            kind.record_largest(1 + sampled)
            total += -(-max(0, in_use() - first) * (kind.num_sizes - 1) // sampled)
    return total


def record(
    config: WorkerConfig,
    runner: ModelRunner,
    max_model_len: int,
    communicator: Communicator,
    foreseen: int,
    progress: Progress,
) -> None:
    """Let the runner replay its steps. `foreseen`: bytes that are left for it."""
    device = runner.cache.device
    before = bytes_in_use(device)
    decode, pieces = _graphs_of(config, runner, max_model_len, communicator)
    progress("recording decode steps", 0.0)
    decode.record_all()
    runner.replay(decode)
    progress("recording decode steps", 1.0)
    if pieces is not None:
        progress("recording mixed steps", 0.0)
        pieces.record_all()
        runner.replay_pieces(pieces)
        progress("recording mixed steps", 1.0)
    taken = bytes_in_use(device) - before
    log.info("CUDA graphs take %s, %s were foreseen", mib(taken), mib(foreseen))
    if taken > foreseen:
        log.warning(
            "CUDA graphs take %s, %s more than was foreseen: lower cache.memory_fraction if memory runs out",
            mib(taken),
            mib(taken - foreseen),
        )


def bytes_in_use(device: torch.device) -> int:
    """Of the device, by anybody, without what torch keeps for later."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _graphs_of(
    config: WorkerConfig, runner: ModelRunner, max_model_len: int, communicator: Communicator
) -> tuple[DecodeGraphs, PieceGraphs | None]:
    cache, model = runner.cache, runner.model
    recorder: Recorder = CudaRecorder(cache.device)
    sizes = DecodeSizes.up_to(config.scheduler.max_num_seqs, max_model_len)
    decode = DecodeGraphs(model, runner.ops, cache, sizes, communicator, recorder)
    rows = piece_rows(min(config.cuda_graph_rows, config.scheduler.max_step_tokens))
    if not rows:
        return decode, None
    return decode, PieceGraphs(model, cache.num_layers, rows, cache.device, communicator, recorder)
