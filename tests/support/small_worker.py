"""A worker that is asked for more than its memory holds: it pauses requests, gives up KV, brings it back."""

from __future__ import annotations

from support.router_server import EOS, MODEL, EchoExecutor, EchoWorker

from ellm.worker.api.config import CacheConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.report import WorkerInfo
from ellm.worker.engine.core import EngineCore
from ellm.worker.engine.plan import ModelLimits
from ellm.worker.front import WorkerFront
from ellm.worker.local_channel import LocalChannel
from ellm.worker.loop import EngineLoop

TPOT_MS, TTFT_MS = 120.0, 1500.0


class SmallWorker(EchoWorker):
    """2,560 tokens, and promises."""

    def __init__(self, number: int, num_host_blocks: int = 256, step_s: float = 0.02) -> None:
        self.limits = ModelLimits(160, 16, 1024, 4096, (EOS, 2), num_host_blocks=num_host_blocks)
        self.executor = EchoExecutor(self.limits, step_s)
        scheduler = SchedulerConfig(max_num_seqs=64, tpot_slo_ms=TPOT_MS, ttft_slo_ms=TTFT_MS)
        config = WorkerConfig(scheduler=scheduler, cache=CacheConfig(), heartbeat_s=0.05)
        self.core = EngineCore(self.limits, config)
        engine = EngineLoop(self.core, self.executor, report_s=config.heartbeat_s)
        info = WorkerInfo(
            f"w{number}", f"epoch{number}", MODEL, "node", 1024, 16, 160, 4096, (EOS, 2), "simulated",
            "none", True, tpot_slo_s=TPOT_MS / 1000, ttft_slo_s=TTFT_MS / 1000,
        )  # fmt: skip
        self.front = WorkerFront(info, config, engine)
        self.channel = LocalChannel(self.front)
