"""The executor of one process: one model, or one rank's part of it, on one device, CPU or GPU.

Where it is a rank of a group, every rank executes the same plans (executor/tensor_parallel.py sees to that).
"""

from __future__ import annotations

import gc
import logging
import os
import platform
import threading
import time
from pathlib import Path

import torch

from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.cost_model import CostModel
from ellm.worker.engine.plan import BatchPlan, ModelLimits, StepResult
from ellm.worker.executor.base import Executor
from ellm.worker.executor.copies import Copier, EndedCopies
from ellm.worker.executor.peers import NoPeers, Peers
from ellm.worker.executor.profile import cache_key, profiled_cost_model
from ellm.worker.executor.rank import LoadedRank, adopt_threads, load_rank
from ellm.worker.model.begun import BegunStep
from ellm.worker.model.grammar import Grammars
from ellm.worker.model.hub import local_folder
from ellm.worker.model.loader import Progress, no_progress
from ellm.worker.model.runner import ModelRunner

log = logging.getLogger(__name__)

_NONE_ENDED = EndedCopies()


class LocalStep:
    """A step that the device has been asked for."""

    def __init__(self, owner: LocalExecutor, step: int, begun_at: float, output: BegunStep) -> None:
        self.begun_at = begun_at  # by time.perf_counter
        self._owner, self._step, self._output = owner, step, output

    @property
    def ended(self) -> bool:
        return self._output.ended

    @property
    def feeds_back(self) -> bool:
        return self._output.feeds_back

    def wait(self) -> None:
        self._output.wait()

    def result(self) -> StepResult:
        output = self._output.read()
        elapsed_s, ended = self._owner.read(self)
        return StepResult(
            self._step,
            tuple(output.token_ids),
            elapsed_s,
            output.logprobs,
            output.prompt_logprobs,
            ended.done,
            ended.failed,
            ended.times,
            output.errors,
        )


class LocalExecutor:
    """See `load`; the constructor takes what is already decided."""

    def __init__(self, rank: LoadedRank, num_threads: int | None) -> None:
        loaded, ops = rank.loaded, rank.ops
        self._runner: ModelRunner | None = rank.runner
        self._tier = rank.tier
        self._copier = rank.copier
        self._limits = rank.limits
        self._grammars = rank.grammars
        self._threads = num_threads
        self._thread_id = -1
        self._read_at = 0.0  # when the last step had been read, by time.perf_counter
        self.architecture = loaded.arch
        self.device = str(loaded.device)
        self.dtype = str(loaded.dtype).removeprefix("torch.")
        self.deterministic = ops.deterministic
        self._body = f"{type(ops).__module__}.{type(ops).__qualname__}, deterministic {ops.deterministic}"

    @staticmethod
    def load(
        config: WorkerConfig, progress: Progress | None = None, peers: Peers | None = None
    ) -> LocalExecutor:
        """Load the checkpoint, measure, size the pool, warm up. Raises ConfigError naming what is wrong."""
        report = progress or no_progress
        rank = load_rank(config, report, peers or NoPeers())
        report("finishing", 1.0)
        return LocalExecutor(rank, config.num_threads)

    @property
    def limits(self) -> ModelLimits:
        return self._limits

    @property
    def grammars(self) -> Grammars | None:
        """What compiles grammars ahead of their sequences; None where none can be obeyed."""
        return self._grammars if self._grammars.available else None

    @property
    def runner(self) -> ModelRunner:
        assert self._runner is not None, "closed"
        return self._runner

    def execute(self, plan: BatchPlan) -> StepResult:
        """Run one step; blocks until its tokens are known. Any exception ends the worker group."""
        return self.begin(plan).result()

    def begin(self, plan: BatchPlan) -> LocalStep:
        """Ask the device for a step. On a GPU it may be asked for the next before this one has been read."""
        if threading.get_ident() != self._thread_id:
            # Thread counts of OpenMP and the JIT belong to the calling thread.
            adopt_threads(self._threads)
            self._thread_id = threading.get_ident()
        begun_at = time.perf_counter()
        if self._copier is not None:
            _begin_copies(self._copier, plan)
        return LocalStep(self, plan.step, begun_at, self.runner.begin(plan))

    def read(self, step: LocalStep) -> tuple[float, EndedCopies]:
        """(seconds that the device had for a step alone, the copies that have ended): of one just read."""
        ended = _NONE_ENDED if self._copier is None else self._copier.ended()
        now = time.perf_counter()
        elapsed_s, self._read_at = now - max(step.begun_at, self._read_at), now
        return elapsed_s, ended

    def profile(
        self, config: WorkerConfig, progress: Progress, executor: Executor | None = None
    ) -> CostModel:
        """How long steps take here, from a short profile or from the one of an earlier start. Call it before
        the first request: it writes to the pool. `executor`: what executes a plan on all ranks."""
        device = torch.device(self.device)
        about = {
            "device": _device_name(device),
            "dtype": self.dtype,
            "threads": torch.get_num_threads() if device.type == "cpu" else 0,
            "body": self._body,
        }
        if device.type == "cpu":
            about["tapes"] = config.decode_tapes
        if device.type == "cuda":
            rows = config.cuda_graph_rows if config.cuda_graphs else 0
            about |= {"cuda_graphs": config.cuda_graphs, "cuda_graph_rows": rows}
        if config.tensor_parallel_size > 1:
            about |= {
                "ranks": config.tensor_parallel_size,
                "overlap": config.tp_overlap_rows if config.tp_overlap else 0,
            }
        folder = local_folder(config.model.path, config.model.revision)
        key = cache_key(folder, self._limits, config.scheduler, about)
        cost_model = profiled_cost_model(executor or self, config.scheduler, key, progress)
        self._thread_id = -1  # whoever loads may end, and its number go to another thread
        return cost_model

    def close(self) -> None:
        """Free weights and pool; copies under way end first."""
        if self._tier is not None:
            self._tier.close()
            self._tier = self._copier = None
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
