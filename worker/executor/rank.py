"""One rank made ready: its part of the model read, measured, warmed up, the pool sized with the other ranks.

Decides dtype, context length and the pool's size; runs the largest admissible plan once, so that no step in
service meets memory for the first time. All ranks decide alike: what depends on a rank's own memory is the
least over all of them, and what they compute here they compute together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ellm.kernels.ops import KernelError, Ops
from ellm.worker.api.config import CacheConfig, WorkerConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.engine.plan import HoleWay, ModelLimits
from ellm.worker.executor.copies import Copier
from ellm.worker.executor.host_tier import HostTier, make_host_tier
from ellm.worker.executor.loaded_model import LoadedModel, load_model
from ellm.worker.executor.memory import PeakMemory, available_bytes
from ellm.worker.executor.peers import Peers
from ellm.worker.executor.pool_size import MemoryBudget, PoolSize, check_transient, share_of_rank, size_pool
from ellm.worker.executor.recording import StepRecording
from ellm.worker.executor.resolve import can_tape, hole_ways, resolve_device, select_ops
from ellm.worker.executor.warm_up import largest_plans, step_kinds
from ellm.worker.model.architecture import Architecture
from ellm.worker.model.computation import Communicator, TensorParallel
from ellm.worker.model.cuda_host_pool import NUM_BUFFERS
from ellm.worker.model.grammar import Grammars
from ellm.worker.model.kv_cache import KVCache, block_bytes, transient_bytes
from ellm.worker.model.loader import Progress
from ellm.worker.model.runner import ModelRunner

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedRank:
    """What computes, and what it decided."""

    runner: ModelRunner
    limits: ModelLimits
    ops: Ops
    loaded: LoadedModel
    tier: HostTier | None
    copier: Copier | None  # the tier's, as all ranks see it
    grammars: Grammars


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a runner is made of, but for its pool."""

    config: WorkerConfig
    ops: Ops
    loaded: LoadedModel
    communicator: Communicator
    ways: tuple[HoleWay, ...]
    recording: StepRecording

    def cache(self, num_blocks: int) -> KVCache:
        cache, loaded = self.config.cache, self.loaded
        return KVCache(
            loaded.arch, num_blocks, cache.block_size, loaded.dtype, loaded.device, cache.transient_blocks
        )

    def runner(self, cache: KVCache, tier: HostTier | None) -> ModelRunner:
        loaded, config = self.loaded, self.config
        overlaps = config.tp_overlap and self.communicator.shard.size > 1
        runner = ModelRunner(
            loaded.model,
            self.ops,
            loaded.arch,
            cache,
            loaded.max_model_len,
            None if tier is None else tier.loads,
            TensorParallel(self.communicator, config.tp_overlap_rows if overlaps else None),
        )
        if self.ways:
            runner.fill_holes(self.ways[0])
        return runner


def load_rank(config: WorkerConfig, progress: Progress, peers: Peers) -> LoadedRank:
    """Load the checkpoint, measure, size the pool, warm up. Raises ConfigError naming what is wrong."""
    device = peers.device(resolve_device(config.model.device))
    adopt_threads(config.num_threads)
    ops = select_ops(config, device)
    available, host_available = available_bytes(device), available_bytes(torch.device("cpu"))
    communicator = peers.communicator(device, ordered=ops.deterministic)
    share = available // peers.size if device.type == "cpu" else available
    with room_for("the weights are loaded", device, "a smaller dtype or more ranks make them fit"):
        loaded = load_model(config, ops, device, progress, communicator, share)
    ways = hole_ways(config, ops)
    recording = StepRecording(config, communicator, lambda so: bool(peers.agree_least([so])[0]))
    parts = _Parts(config, ops, loaded, communicator, ways, recording)
    cache_config = share_of_rank(config.cache, peers.size)
    budget = _budget(cache_config, loaded, available, host_available, peers.size)
    check_transient(cache_config, budget)
    with room_for("the largest step runs", device, "lower scheduler.max_step_tokens or max_num_seqs"):
        activations, graphs = _warm_up(parts, progress)
    budget = replace(budget, activations=activations, graphs=graphs or 0)
    size = _agreed_size(config, cache_config, budget, loaded.max_model_len, peers)
    cache = parts.cache(size.num_blocks)
    tier = make_host_tier(cache, size.num_host_blocks, budget.block, ops) if size.num_host_blocks else None
    copier = None if tier is None else peers.copier(tier.copier, budget.block)
    limits = replace(_limits(config, loaded.arch, size, budget), hole_ways=ways)
    runner = parts.runner(cache, tier)
    grammars = Grammars(loaded.folder, loaded.arch.vocab_size, loaded.arch.eos_token_ids)
    runner.obey(grammars)
    if can_tape(config, ops):
        from ellm.worker.model.tapes import DecodeTapes  # needs numba

        rows = config.scheduler.max_num_seqs
        runner.replay(DecodeTapes(loaded.model, ops, cache, rows, limits.max_model_len))
    if graphs is not None:
        with room_for("steps are recorded", device, "lower cache.memory_fraction or cuda_graph_rows"):
            recording.record(runner, limits.max_model_len, graphs, progress)
    return LoadedRank(runner, limits, ops, loaded, tier, copier, grammars)


def adopt_threads(num_threads: int | None) -> None:
    """Let the calling thread compute on `num_threads` CPU threads; None leaves the default."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)


@contextmanager
def room_for(what: str, device: torch.device, remedy: str) -> Iterator[None]:
    """A device that is full at start is an error of the configuration, in words."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{device} has too little memory while {what}: {remedy} ({reason})") from None


def _agreed_size(
    config: WorkerConfig, cache: CacheConfig, budget: MemoryBudget, max_model_len: int, peers: Peers
) -> PoolSize:
    """The least of all ranks' sizes: block ids mean the same everywhere."""
    size = size_pool(cache, budget, max_model_len, may_shorten=config.model.max_model_len is None)
    least = peers.agree_least((size.num_blocks, size.max_model_len, size.num_host_blocks))
    num_blocks, agreed_len, num_host_blocks = least
    if agreed_len < max_model_len:
        log.warning("max_model_len is %d, not %d: the KV pool holds no more", agreed_len, max_model_len)
    kept = {"KV pool": num_blocks * budget.block, "host KV pool": num_host_blocks * budget.block}
    memory = tuple((what, kept.get(what, count)) for what, count in size.memory)
    return PoolSize(num_blocks, agreed_len, memory, num_host_blocks)


def _limits(config: WorkerConfig, arch: Architecture, size: PoolSize, budget: MemoryBudget) -> ModelLimits:
    return ModelLimits(
        num_blocks=size.num_blocks,
        block_size=config.cache.block_size,
        max_model_len=size.max_model_len,
        vocab_size=arch.vocab_size,
        eos_token_ids=arch.eos_token_ids,
        memory=size.memory,
        num_host_blocks=size.num_host_blocks,
        num_transient_blocks=config.cache.transient_blocks,
        block_bytes=budget.block if size.num_host_blocks else 0,
    )


def _budget(
    cache: CacheConfig, loaded: LoadedModel, available: int, host_available: int, num_ranks: int
) -> MemoryBudget:
    """All but the activations, which are yet to be measured. Ranks share their machine's memory."""
    on_cpu = loaded.device.type == "cpu"
    block = block_bytes(loaded.arch, cache.block_size, loaded.dtype)
    return MemoryBudget(
        available=available // num_ranks if on_cpu else available,
        weights=loaded.weight_bytes,
        activations=0,
        block=block,
        on_cpu=on_cpu,
        transient=cache.transient_blocks * transient_bytes(loaded.arch, cache.block_size, loaded.dtype),
        host_available=host_available // num_ranks,
        host_buffers=0 if on_cpu or not cache.host_bytes else NUM_BUFFERS * block,
        num_ranks=num_ranks,
    )


def _warm_up(parts: _Parts, progress: Progress) -> tuple[int, int | None]:
    """Run every kind of step, then the largest, on a pool of their own: bytes at the peak of the largest, and
    those that recorded steps will take, None where none are.

    Raises ConfigError where a kernel that STRICT needs cannot be had.
    """
    config, max_model_len = parts.config, parts.loaded.max_model_len
    largest, num_blocks = largest_plans(config, max_model_len)
    whole, *holed = largest
    largest = [whole, *(replace(plan, way=way) for plan in holed for way in parts.ways)]
    runner = parts.runner(parts.cache(num_blocks), None)
    kinds = list(step_kinds(config.scheduler, config.cache.block_size, max_model_len))
    try:
        for i, plan in enumerate(kinds):
            progress("warming up", i / (len(kinds) + 1))
            runner.execute(plan)
        peak = PeakMemory(parts.loaded.device)
        for plan in largest:
            runner.execute(plan)
    except KernelError as error:
        raise ConfigError(str(error), param="model.deterministic") from None
    activations, graphs = peak.read(), None
    if parts.recording.possible(parts.ops, parts.loaded.device):
        graphs = parts.recording.foreseen_bytes(runner, max_model_len)
    progress("warming up", 1.0)
    return activations, graphs
