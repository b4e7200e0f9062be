"""What a simulated cluster is made of, and what comes in for a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ellm.loadtest.sim.checkpoint import find_model
from ellm.loadtest.sim.cluster_control import worker_info
from ellm.loadtest.sim.device import Device, profile
from ellm.loadtest.sim.executor import TimedExecutor
from ellm.loadtest.sim.presets import find_gpu
from ellm.loadtest.sim.workload import SimRequest, make_requests, with_arrivals
from ellm.worker.api.config import CacheConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.cost_model import CostModel
from ellm.worker.api.errors import ConfigError
from ellm.worker.api.report import WorkerInfo
from ellm.worker.engine.core import EngineCore
from ellm.worker.executor.simulated_link import LinkSpeed

_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class WorkerKind:
    """How one worker differs from the others."""

    memory: float = 1.0  # share of the KV pool that the GPU would have
    speed: float = 1.0  # of arithmetic and memory

    @property
    def word(self) -> str:
        return f"{self.memory:g} of memory, {self.speed:g} of speed"


MIXED = (  # heterogeneous memory and one slow worker
    WorkerKind(),
    WorkerKind(),
    WorkerKind(),
    WorkerKind(memory=0.6),
    WorkerKind(memory=0.6),
    WorkerKind(memory=0.4),
    WorkerKind(memory=0.4),
    WorkerKind(speed=0.5),
)


@dataclass(frozen=True, slots=True)
class ClusterSetting:
    """Everything but the routing policy and the seed."""

    model: str
    gpu: str
    workload: str  # a trace file, or a name of LENGTHS
    num_requests: int
    rate: float  # requests per second
    cv: float = 1.7  # of the gaps between them; gamma
    workers: tuple[WorkerKind, ...] = MIXED
    num_routers: int = 4
    report_s: float = 0.1
    report_delay_s: float = 0.0
    hop_s: float = 0.0005  # from a router to a worker
    tpot_slo_s: float = 0.1
    ttft_slo_s: float | None = None
    controller: bool = True  # routers follow its weights and budgets
    scheduling: str = "adaptive"
    max_num_seqs: int = 256
    max_step_tokens: int = 2048

    def check(self) -> None:
        """Raise ConfigError for what cannot be simulated."""
        positive = ("num_requests", "rate", "num_routers", "report_s", "tpot_slo_s", "max_step_tokens")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0", param=name)
        if not self.workers:
            raise ConfigError("a cluster has at least one worker", param="workers")
        if self.report_delay_s < 0.0 or self.hop_s < 0.0:
            raise ConfigError("what is delayed cannot come before it was sent", param="report_delay_s")
        for number in range(len(self.workers)):
            self.device(number).check()

    def device(self, number: int) -> Device:
        """Of worker `number`."""
        kind, gpu = self.workers[number], find_gpu(self.gpu)
        slower = replace(
            gpu,
            flop_per_s=gpu.flop_per_s * kind.speed,
            memory_bytes_per_s=gpu.memory_bytes_per_s * kind.speed,
        )
        whole = Device(find_model(self.model), slower)
        return replace(whole, kv_bytes=whole.pool_bytes * kind.memory)

    def requests(self, seed: int) -> list[SimRequest]:
        """Those that fit into the smallest worker: a request that fits nowhere is no matter of routing."""
        room = min(self.device(n).limits().max_model_len for n in range(len(self.workers)))
        requests, _ = make_requests(self.workload, self.num_requests, seed, room)
        return with_arrivals(requests, self.rate, self.cv, seed)

    def info(self, number: int) -> WorkerInfo:
        """What worker `number` says of itself."""
        limits = self.device(number).limits()
        return worker_info(number, self.model, _BLOCK_SIZE, limits.num_blocks, limits.max_model_len)

    def core(self, number: int, *, shares: bool) -> EngineCore:
        """The real engine's core, as worker `number` would make it."""
        config = WorkerConfig(
            scheduler=SchedulerConfig(
                policy=self.scheduling,
                max_num_seqs=self.max_num_seqs,
                max_step_tokens=self.max_step_tokens,
                max_waiting=max(4096, self.num_requests),
                tpot_slo_ms=1000.0 * self.tpot_slo_s,
                ttft_slo_ms=None if self.ttft_slo_s is None else 1000.0 * self.ttft_slo_s,
            ),
            cache=CacheConfig(block_size=_BLOCK_SIZE, prefix_caching=shares),
        )
        device = self.device(number)
        learnt = CostModel.from_dict(learnt_profile(device, self.max_step_tokens))
        return EngineCore(device.limits(), config, cost_model=learnt)

    def executor(self, number: int, requests: list[SimRequest]) -> TimedExecutor:
        device = self.device(number)
        link = LinkSpeed(bytes_per_s=device.gpu.link_bytes_per_s)
        return TimedExecutor(
            device.limits(), device.cost(), lambda new: requests[new.sampling.seed or 0].output_tokens, link
        )


@cache
def learnt_profile(device: Device, max_rows: int) -> dict[str, Any]:
    """What an engine's cost model knows when it begins; worked out once for each kind of device."""
    learnt = profile(device.cost(), max_rows=max_rows, max_kv_tokens=device.capacity_tokens)
    return learnt.to_dict()
