"""A router on a loopback port over a worker that computes: a tiny random checkpoint, on one thread."""

from __future__ import annotations

from pathlib import Path

from support import golden
from support.router_server import EchoWorker, RouterServer

from ellm.router.config import RouterConfig
from ellm.worker.api.config import SchedulerConfig, WorkerConfig
from ellm.worker.api.report import WorkerInfo
from ellm.worker.engine.core import EngineCore
from ellm.worker.front import WorkerFront
from ellm.worker.local_channel import LocalChannel
from ellm.worker.loop import EngineLoop

NAME = "tiny"


class ModelWorker(EchoWorker):
    """A worker with an executor that computes."""

    def __init__(self, folder: Path, number: int = 0, num_blocks: int = 512) -> None:
        made = golden.executor(folder, jit=False, num_blocks=num_blocks)
        limits = self.limits = made.limits
        config = WorkerConfig(scheduler=SchedulerConfig(max_num_seqs=32), heartbeat_s=0.05)
        self.core = EngineCore(limits, config)
        engine = EngineLoop(self.core, made, report_s=config.heartbeat_s, grammars=made.grammars)
        info = WorkerInfo(
            f"w{number}", f"epoch{number}", NAME, "node", limits.max_model_len, limits.block_size,
            limits.num_blocks, limits.vocab_size, limits.eos_token_ids, "cpu", "float32", True,
            grammars=made.grammars is not None,
        )  # fmt: skip
        self.front = WorkerFront(info, config, engine)
        self.channel = LocalChannel(self.front)


def model_server(folder: Path, *workers: ModelWorker) -> RouterServer:
    """Its streams may be silent for long on a busy machine; nothing fails over."""
    return RouterServer(list(workers) or [ModelWorker(folder)], RouterConfig(refresh_s=0.05), folder=folder)
