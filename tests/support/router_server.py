"""A router on a loopback port over workers in the same process, for tests that speak HTTP.

All of it is the product but two things: the executor says back what the prompt says (`EchoExecutor`), so that
a test chooses the text that comes, and the server is uvicorn in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import httpx
import uvicorn
from support.tree import ROOT

from ellm.router.access import Access
from ellm.router.app import ModelSource, create_app
from ellm.router.config import RouterConfig
from ellm.router.exchange import Service
from ellm.router.models import Models
from ellm.router.request_heads import bounded
from ellm.router.rpc.server import Listen, with_rpc
from ellm.worker.api.config import SchedulerConfig, WorkerConfig
from ellm.worker.api.cost_model import CostModel
from ellm.worker.api.report import WorkerInfo
from ellm.worker.engine.core import EngineCore
from ellm.worker.engine.plan import BatchPlan, ModelLimits, StepResult
from ellm.worker.executor.simulated import SimulatedExecutor
from ellm.worker.front import WorkerFront
from ellm.worker.local_channel import LocalChannel, LocalDirectory
from ellm.worker.loop import EngineLoop

MODEL = "pydoc-5m"
FOLDER = ROOT / "deploy" / "bundled" / MODEL
EOS = 1
T = TypeVar("T")


class EchoExecutor(SimulatedExecutor):
    """Says the prompt's tokens again, then end-of-text; with `ignore_eos` it starts over. `gate` holds it."""

    def __init__(self, limits: ModelLimits, step_s: float) -> None:
        super().__init__(limits, CostModel.known(overhead_s=step_s), realtime=True)
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def execute(self, plan: BatchPlan) -> StepResult:
        self.gate.wait(30)
        if self.error is not None:
            raise self.error
        return super().execute(plan)

    def _sample(self, resident, digest):  # type: ignore[no-untyped-def]
        said = len(resident.tokens) - resident.num_prompt
        if said >= resident.num_prompt and not resident.sampling.ignore_eos:
            return EOS
        return resident.tokens[said % resident.num_prompt]


class EchoWorker:
    """One worker: front, engine, executor, and the channel that leads to it."""

    def __init__(
        self, number: int, step_s: float = 0.0005, max_model_len: int = 2048, model: str = MODEL
    ) -> None:
        self.limits = ModelLimits(2048, 16, max_model_len, 4096, (EOS, 2))
        self.executor = EchoExecutor(self.limits, step_s)
        config = WorkerConfig(scheduler=SchedulerConfig(max_num_seqs=256), heartbeat_s=0.05)
        self.core = EngineCore(self.limits, config)
        engine = EngineLoop(self.core, self.executor, report_s=config.heartbeat_s)
        limits = self.limits
        info = WorkerInfo(
            f"w{number}", f"epoch{number}", model, "node", limits.max_model_len, limits.block_size,
            limits.num_blocks, limits.vocab_size, limits.eos_token_ids, "simulated", "none", True,
        )  # fmt: skip
        self.front = WorkerFront(info, config, engine)
        self.channel = LocalChannel(self.front)

    def free_blocks(self) -> int:
        """Blocks that nobody references."""
        report = self.front.report()
        return report.free_blocks + report.cached_blocks


class RouterServer:
    """Started by `with`; `url` answers until the block ends."""

    def __init__(
        self,
        workers: Sequence[EchoWorker] | None = None,
        config: RouterConfig | None = None,
        broken: dict[str, str] | None = None,
        folder: Path = FOLDER,
        *,
        grpc: bool = False,
    ) -> None:
        """Each model that a worker has is served; `broken` are models that cannot be. `folder`: of the
        tokenizer. With `grpc` it speaks that too, on `rpc.port`."""
        self._folder = folder
        self.workers = [EchoWorker(0)] if workers is None else list(workers)
        self.config = config or RouterConfig(refresh_s=0.05)
        names = dict.fromkeys(worker.channel.info.model for worker in self.workers) or {MODEL: None}
        self.directories = {
            name: LocalDirectory(*(w.channel for w in self.workers if w.channel.info.model == name))
            for name in names
        }
        self.directory = next(iter(self.directories.values()))
        self._broken = broken
        self._grpc = grpc
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> RouterServer:
        self._thread.start()
        wait_until(self._ready, 10)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, **options)  # type: ignore[arg-type]

    def on_loop(self, work: Callable[[], T]) -> T:
        """Run `work` on the server's event loop."""

        async def run() -> T:
            return work()

        return self.wait_for(run())

    def wait_for(self, awaitable: Awaitable[T]) -> T:
        assert self._loop is not None

        async def run() -> T:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(20)

    def add(self, worker: EchoWorker) -> None:
        """Start a worker and let the directory name it."""

        def start() -> None:
            worker.front.start()
            self.directory.channels[worker.channel.info.epoch] = worker.channel

        self.on_loop(start)
        self.workers.append(worker)

    def _ready(self) -> bool:
        if self._grpc and not (hasattr(self, "rpc") and self.rpc.port):
            return False
        try:
            return not self.workers or httpx.get(f"{self.url}/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        for worker in self.workers:
            worker.front.start()
        sources = [ModelSource(name, self._folder, directory) for name, directory in self.directories.items()]
        app = self.app = create_app(self.config, sources, broken=self._broken)
        if self._grpc:
            self.rpc = with_rpc(app, self.config, Listen("127.0.0.1", 0))
        self.models: Models = app.state.models
        self.access: Access = app.state.access
        self.service: Service = next(iter(self.models.services.values()))
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        http = bounded(self.config.limits)
        config = uvicorn.Config(
            app, http=http, log_config=None, access_log=False, timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        await self._server.serve(sockets=[self._socket])
        for worker in self.workers:
            await worker.front.close()


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def router_config(**changes: object) -> RouterConfig:
    """Short periods for tests, and requests that are spread evenly however fast a worker seems."""
    config = RouterConfig(refresh_s=0.05, policy="least-requests", audit_log="off")
    return replace(config, **changes)  # type: ignore[arg-type]
