"""The executor of one process: one model on one device, CPU or GPU, no group.

Decides dtype, context length and the pool's size at start; runs the largest admissible plan once, so that no
step in service meets memory for the first time.
"""

from __future__ import annotations

import gc
import logging
import os
import platform
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

from ellm.kernels.ops import Ops
from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.cost_model import CostModel
from ellm.worker.engine.plan import BatchPlan, ModelLimits, StepResult
from ellm.worker.executor.copies import Copier, EndedCopies
from ellm.worker.executor.host_tier import HostTier, make_host_tier
from ellm.worker.executor.loaded_model import LoadedModel, load_model, weight_bytes
from ellm.worker.executor.memory import PeakMemory, available_bytes
from ellm.worker.executor.pool_size import MemoryBudget, PoolSize, check_transient, size_pool
from ellm.worker.executor.profile import cache_key, profiled_cost_model
from ellm.worker.executor.resolve import resolve_device, select_ops
from ellm.worker.executor.warm_up import largest_plans, step_kinds
from ellm.worker.model.architecture import Architecture
from ellm.worker.model.cuda_host_pool import NUM_BUFFERS
from ellm.worker.model.hub import local_folder
from ellm.worker.model.kv_cache import KVCache, block_bytes, transient_bytes
from ellm.worker.model.loader import Progress, no_progress
from ellm.worker.model.runner import ModelRunner

log = logging.getLogger(__name__)

_NONE_ENDED = EndedCopies()


class LocalExecutor:
    """See `load`; the constructor takes what is already decided."""

    def __init__(
        self,
        runner: ModelRunner,
        limits: ModelLimits,
        ops: Ops,
        loaded: LoadedModel,
        num_threads: int | None,
        tier: HostTier | None = None,
    ) -> None:
        self._runner: ModelRunner | None = runner
        self._tier = tier
        self._limits = limits
        self._threads = num_threads
        self._thread_id = -1
        self.architecture = loaded.arch
        self.device = str(loaded.device)
        self.dtype = str(loaded.dtype).removeprefix("torch.")
        self.deterministic = ops.deterministic
        self._body = f"{type(ops).__module__}.{type(ops).__qualname__}, deterministic {ops.deterministic}"

    @staticmethod
    def load(config: WorkerConfig, progress: Progress | None = None) -> LocalExecutor:
        """Load the checkpoint, measure, size the pool, warm up. Raises ConfigError naming what is wrong."""
        report = progress or no_progress
        device = resolve_device(config.model.device)
        adopt_threads(config.num_threads)
        ops = select_ops(config, device)
        available, host_available = available_bytes(device), available_bytes(torch.device("cpu"))
        loaded = load_model(config, ops, device, report)
        max_model_len = loaded.max_model_len
        budget = _budget(config, loaded, available, host_available)
        check_transient(config.cache, budget)
        budget = replace(budget, activations=_warm_up(config, loaded, ops, report))
        asked = config.model.max_model_len is not None
        size = size_pool(config.cache, budget, max_model_len, may_shorten=not asked)
        if size.max_model_len < max_model_len:
            log.warning(
                "max_model_len is %d, not %d: the KV pool holds no more", size.max_model_len, max_model_len
            )
        cache = _cache(config, loaded, size.num_blocks)
        tier = make_host_tier(cache, size.num_host_blocks, budget.block) if size.num_host_blocks else None
        runner = _runner(loaded, ops, cache, tier)
        report("ready", 1.0)
        limits = _limits(config, loaded.arch, size, budget)
        return LocalExecutor(runner, limits, ops, loaded, config.num_threads, tier)

    @property
    def limits(self) -> ModelLimits:
        return self._limits

    @property
    def runner(self) -> ModelRunner:
        assert self._runner is not None, "closed"
        return self._runner

    def execute(self, plan: BatchPlan) -> StepResult:
        """Run one step; blocks until its tokens are known. Any exception ends the worker group."""
        if threading.get_ident() != self._thread_id:
            # Thread counts of OpenMP and the JIT belong to the calling thread.
            adopt_threads(self._threads)
            self._thread_id = threading.get_ident()
        start = time.perf_counter()
        if self._tier is not None:
            _begin_copies(self._tier.copier, plan)
        output = self.runner.execute(plan)
        ended = _NONE_ENDED if self._tier is None else self._tier.copier.ended()
        elapsed = time.perf_counter() - start
        return StepResult(
            plan.step,
            tuple(output.token_ids),
            elapsed,
            output.logprobs,
            output.prompt_logprobs,
            ended.done,
            ended.failed,
            ended.times,
        )

    def profile(self, config: WorkerConfig, progress: Progress) -> CostModel:
        """How long steps take here, from a short profile or from the one of an earlier start. Call it before
        the first request: it writes to the pool."""
        device = torch.device(self.device)
        about = {
            "device": _device_name(device),
            "dtype": self.dtype,
            "threads": torch.get_num_threads() if device.type == "cpu" else 0,
            "body": self._body,
        }
        folder = local_folder(config.model.path, config.model.revision)
        key = cache_key(folder, self._limits, config.scheduler, about)
        return profiled_cost_model(self, config.scheduler, key, progress)

    def close(self) -> None:
        """Free weights and pool; copies under way end first."""
        if self._tier is not None:
            self._tier.close()
            self._tier = None
        self._runner = None
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()


def _begin_copies(copier: Copier, plan: BatchPlan) -> None:
    """Start the plan's copies, and wait for those that it says."""
    if plan.saves or plan.loads:
        copier.start(plan.saves, plan.loads)
    if plan.waits:
        copier.wait_all()
    elif not plan.entries:
        copier.wait_next()


def adopt_threads(num_threads: int | None) -> None:
    """Let the calling thread compute on `num_threads` CPU threads; None leaves the default."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def _device_name(device: torch.device) -> str:
    """Of the GPU, or of the processor with the cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model
        )
    return f"{model}, {cores} cores"


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


def _budget(config: WorkerConfig, loaded: LoadedModel, available: int, host_available: int) -> MemoryBudget:
    """All but the activations, which are yet to be measured."""
    cache, on_cpu = config.cache, loaded.device.type == "cpu"
    block = block_bytes(loaded.arch, cache.block_size, loaded.dtype)
    return MemoryBudget(
        available=available,
        weights=weight_bytes(loaded),
        activations=0,
        block=block,
        on_cpu=on_cpu,
        transient=cache.transient_blocks * transient_bytes(loaded.arch, cache.block_size, loaded.dtype),
        host_available=host_available,
        host_buffers=0 if on_cpu or not cache.host_bytes else NUM_BUFFERS * block,
    )


def _cache(config: WorkerConfig, loaded: LoadedModel, num_blocks: int) -> KVCache:
    block_size, num_transient = config.cache.block_size, config.cache.transient_blocks
    return KVCache(loaded.arch, num_blocks, block_size, loaded.dtype, loaded.device, num_transient)


def _runner(loaded: LoadedModel, ops: Ops, cache: KVCache, tier: HostTier | None) -> ModelRunner:
    loads = None if tier is None else tier.loads
    return ModelRunner(loaded.model, ops, loaded.arch, cache, loaded.max_model_len, loads)


def _warm_up(config: WorkerConfig, loaded: LoadedModel, ops: Ops, progress: Progress) -> int:
    """Run every kind of step, then the largest, on a pool of their own; bytes at the peak of the largest."""
    block_size, max_model_len = config.cache.block_size, loaded.max_model_len
    largest, num_blocks = largest_plans(config, max_model_len)
    runner = _runner(loaded, ops, _cache(config, loaded, num_blocks), None)
    kinds = list(step_kinds(config.scheduler, block_size, max_model_len))
    for i, plan in enumerate(kinds):
        progress("warming up", i / (len(kinds) + 1))
        runner.execute(plan)
    peak = PeakMemory(loaded.device)
    for plan in largest:
        runner.execute(plan)
    progress("warming up", 1.0)
    return peak.read()
