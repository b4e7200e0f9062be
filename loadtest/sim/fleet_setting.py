"""What a simulated fleet is made of: its workers, how they start and die, the day that comes in.

Unlike a cluster setting (cluster_setting.py) the number of workers is not fixed: the controller says it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ellm.cluster.api.config import ControllerConfig, ModelScale
from ellm.loadtest.sim.checkpoint import find_model
from ellm.loadtest.sim.cluster_control import worker_info
from ellm.loadtest.sim.cluster_setting import learnt_profile
from ellm.loadtest.sim.device import Device
from ellm.loadtest.sim.diurnal import day_arrivals, day_requests
from ellm.loadtest.sim.executor import TimedExecutor
from ellm.loadtest.sim.presets import find_gpu
from ellm.loadtest.sim.workload import SimRequest
from ellm.router.config import FailoverConfig
from ellm.worker.api.config import CacheConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.cost_model import CostModel
from ellm.worker.api.errors import ConfigError
from ellm.worker.api.report import WorkerInfo
from ellm.worker.engine.core import EngineCore
from ellm.worker.executor.simulated_link import LinkSpeed

_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class StartUp:
    """Seconds until a worker that was asked for serves, by phase. Assumed for a GPU node that is there and
    has the image and the checkpoint on a local disk; a run may set others."""

    place_s: float = 3.0  # Ray finds a node and makes the actors
    process_s: float = 15.0  # Python, torch, the device's context
    weights_bytes_per_s: float = 2.5e9  # from disk into the device
    warm_up_s: float = 12.0  # the pool is sized, the largest step runs, graphs are recorded
    jitter: float = 0.1  # a start takes between 1 - jitter and 1 + jitter of the sum

    def phases(self, weight_bytes: float) -> dict[str, float]:
        return {
            "place": self.place_s,
            "process": self.process_s,
            "weights": weight_bytes / self.weights_bytes_per_s,
            "warm-up": self.warm_up_s,
        }


@dataclass(frozen=True, slots=True)
class Deaths:
    """How workers die: every other one a process that ends, whose connections break at once; the rest nodes
    that fall silent, which routers notice after their own failover time and Ray after `silent_noticed_s`."""

    count: int = 12  # over the whole run, at times spread at random
    crash_noticed_s: float = 0.5  # until a replacement is asked for
    silent_noticed_s: float = 65.0


@dataclass(frozen=True, slots=True)
class FleetSetting:
    """Everything but the seed."""

    trace: str  # lengths
    model: str = "qwen3-32b"
    gpu: str = "a100-80g"
    tp: int = 1
    min_workers: int = 4
    max_workers: int = 20
    duration_s: float = 7200.0
    peak_rate: float = 13.0  # requests per second
    cv: float = 1.7
    scheduling: str = "adaptive"
    routing: str = "headroom"
    num_routers: int = 2
    report_s: float = 0.25  # a worker's own is 0.1: a third of this simulation's time would go there
    hop_s: float = 0.0005  # from a router to a worker
    tpot_slo_s: float = 0.1
    ttft_slo_s: float = 5.0
    max_num_seqs: int = 256
    max_step_tokens: int = 2048
    host_bytes: float = 0.0
    drain_timeout_s: float = 60.0
    queue_timeout_s: float = 30.0
    start_up: StartUp = field(default_factory=StartUp)
    deaths: Deaths = field(default_factory=Deaths)
    failover: FailoverConfig = field(default_factory=FailoverConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)

    def check(self) -> None:
        """Raise ConfigError for what cannot be simulated."""
        if not 1 <= self.min_workers <= self.max_workers:
            raise ConfigError("there are 1 <= min_workers <= max_workers", param="min_workers")
        for name in ("num_routers", "report_s", "tpot_slo_s", "ttft_slo_s", "max_step_tokens"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0", param=name)
        self.device.check()

    @property
    def device(self) -> Device:
        return Device(find_model(self.model), find_gpu(self.gpu), self.tp, host_bytes=self.host_bytes)

    @property
    def scale(self) -> ModelScale:
        return ModelScale(self.model, self.min_workers, self.max_workers)

    @property
    def autoscales(self) -> bool:
        return self.min_workers < self.max_workers

    def requests(self, seed: int) -> tuple[list[SimRequest], int]:
        """The day's requests, and how many rows of the trace fit into no worker."""
        arrivals = day_arrivals(self.duration_s, self.peak_rate, self.cv, seed)
        return day_requests(Path(self.trace), arrivals, self.device.limits().max_model_len, seed)

    def info(self, number: int) -> WorkerInfo:
        """What worker `number` says of itself."""
        limits = self.device.limits()
        return worker_info(number, self.model, _BLOCK_SIZE, limits.num_blocks, limits.max_model_len)

    def core(self) -> EngineCore:
        """The real engine's core, as a worker would make it."""
        config = WorkerConfig(
            scheduler=SchedulerConfig(
                policy=self.scheduling,
                max_num_seqs=self.max_num_seqs,
                max_step_tokens=self.max_step_tokens,
                tpot_slo_ms=1000.0 * self.tpot_slo_s,
                ttft_slo_ms=1000.0 * self.ttft_slo_s,
            ),
            cache=CacheConfig(block_size=_BLOCK_SIZE, prefix_caching=False),
        )
        device = self.device
        learnt = CostModel.from_dict(learnt_profile(device, self.max_step_tokens))
        return EngineCore(device.limits(), config, cost_model=learnt)

    def executor(self, requests: list[SimRequest]) -> TimedExecutor:
        device = self.device
        link = LinkSpeed(bytes_per_s=device.gpu.link_bytes_per_s)
        return TimedExecutor(
            device.limits(), device.cost(), lambda new: requests[new.sampling.seed or 0].output_tokens, link
        )
