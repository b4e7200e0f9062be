"""The actor of rank 0: the process of a worker with the engine, the front that routers talk to, and the
device, or the first of several over which the model is spread (the others: worker/follower_actor.py).

It is found by its name (worker/api/actor_name.py), never restarts by itself, and ends as soon as its engine
fails or its supervisor is gone: routers see the death and move their requests. Loading runs off the event
loops, so that progress can be asked for meanwhile. Requests and tokens do not pass through Ray: a router asks
`describe` where to connect (worker/stream_server.py). That data path has one event loop; control has another,
which answers while the first is busy.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import sys
import time
from dataclasses import dataclass
from typing import Any

import ray

from ellm.worker.api import json_log, wire
from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.errors import EllmError
from ellm.worker.api.metric_export import PERIOD_S, MetricExport
from ellm.worker.api.metrics import DECLARED, counts, gauges
from ellm.worker.api.report import WorkerInfo
from ellm.worker.build import LoadedEngine, load_engine
from ellm.worker.front import WorkerFront
from ellm.worker.loop import EngineLoop
from ellm.worker.start_times import StartTimes
from ellm.worker.stream_server import StreamServer
from ellm.worker.watchdog import Watchdog

log = logging.getLogger(__name__)

EXIT_FAILED = 71
CONCURRENCY_GROUPS = {"control": 8}  # beside the default one
# With the default of 5 ms an event loop waits that long for the interpreter while the engine plans a step.
SWITCH_INTERVAL_S = 0.0005


@dataclass(frozen=True, slots=True)
class RankStatus:
    """What the supervisor learns from each ping."""

    pid: int
    state: str  # of WorkerState
    progress: tuple[str, float]  # of loading: (what, share)
    since_progress_s: float = 0.0  # work without a finished step for so long
    num_live: int = 0  # requests
    num_streams: int = 0
    error: tuple[str, str] | None = None  # (code, message) of a failed load
    drained: bool = False  # on request, and it is to be replaced
    supervisor_pid: int | None = None  # where that is known
    since_tick_s: float = 0.0  # so long the event loop of the data path has stood still


class RankActor:
    """Rank 0 of a group; see `rank_actor` for how it is made."""

    def __init__(
        self, config: WorkerConfig, worker_id: str, epoch: str, lease_s: float, supervisor_pid: int | None
    ) -> None:
        """`supervisor_pid` where the supervisor runs on this node."""
        json_log.install("worker")
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._config = config
        self._worker_id = worker_id
        self._epoch = epoch
        self._supervisor_pid = supervisor_pid
        self._watchdog = Watchdog(lease_s, () if supervisor_pid is None else (supervisor_pid,))
        self._progress = ("starting", 0.0)
        self._start = StartTimes()
        self._error: tuple[str, str] | None = None
        self._front: WorkerFront | None = None
        self._engine: EngineLoop | None = None
        self._server: StreamServer | None = None
        self._rendezvous: Any = None  # where the other ranks meet this one
        self._drained = False
        self._export: asyncio.Task[None] | None = None
        self._secret = secrets.token_bytes(16)
        self._host = ray.util.get_node_ip_address()
        self._port = 0

    # Data: one event loop.

    async def open(self) -> tuple[int, int]:
        """(its pid, the port on this machine at which the other ranks meet it, 0 where there are none)."""
        port = 0
        if self._config.tensor_parallel_size > 1:
            self._note_progress("importing torch", 0.0)
            self._rendezvous, port = await asyncio.to_thread(_listen)
        return os.getpid(), port

    async def load(self, rank_pids: tuple[int, ...], waited_s: float = 0.0) -> bool:
        """Load the model with the other ranks and begin to serve. `rank_pids`: of all, this one first;
        `waited_s`: since they were asked for. False if that is not possible; `renew` then tells why."""
        self._start.waited(waited_s)
        try:
            loaded = await asyncio.to_thread(self._load)
        except EllmError as error:
            self._error = (error.code, error.message)
            return False
        except Exception as error:  # the edge: a lost group, or what a device throws
            log.exception("loading failed")
            self._error = (EllmError.code, str(error) or repr(error))
            return False
        self._engine = EngineLoop(
            loaded.core,
            loaded.executor,
            report_s=self._config.heartbeat_s,
            on_failure=self._engine_failed,
            grammars=loaded.grammars,
        )
        self._front = WorkerFront(
            self._info(loaded, rank_pids), self._config, self._engine, on_failure=self._engine_failed
        )
        self._front.start()
        server = StreamServer(self._front, self._secret)
        self._port = await server.start(self._host)
        self._server = server
        self._export = asyncio.create_task(self._export_forever(self._front))
        # What is loaded by now stays: the collector need not look at it again while tokens wait.
        gc.collect()
        gc.freeze()
        took = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in self._front.info.start_s)
        log.info("worker %s (%s) serves; its start took: %s", self._worker_id, self._epoch, took)
        return True

    async def describe(self) -> tuple[wire.Message, str, int, bytes] | None:
        """(packed WorkerInfo, host, port, secret) for a router to connect with; None while loading."""
        if self._front is None or self._server is None:
            return None
        return self._front.describe(), self._host, self._port, self._secret

    async def drain(self, timeout_s: float | None = None, *, keep: bool = False) -> bool:
        """Take no new request, hand back what does not run, let the rest run for `timeout_s` (the config's
        where it is None) and hand that back, too. Then the streams end and the supervisor has the group
        replaced; with `keep` it stays up and drained. True if nothing was cut short."""
        if self._front is None or self._server is None:
            return True
        done = await self._front.drain(self._config.drain_timeout_s if timeout_s is None else timeout_s)
        if not keep:
            self._drained = True
            self._front.end_streams()
            await self._server.close()
        return done

    async def _export_forever(self, front: WorkerFront) -> None:
        """This worker's own metrics, through Ray."""
        from ray.util import metrics as ray_metrics

        export, info = MetricExport(ray_metrics, DECLARED), front.info
        while True:
            try:
                report = front.report()
                export.update(dict(counts(info, report)) | dict(gauges(info, report)))
            except Exception:  # nothing depends on it
                log.exception("metrics could not be exported")
            await asyncio.sleep(PERIOD_S)

    # Control: another event loop; reads only.

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    async def renew(self) -> RankStatus:
        """Renew the lease; returns how the rank is. The supervisor's."""
        self._watchdog.renew()
        return self._status()

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    async def status(self) -> RankStatus:
        """How the rank is, for anybody."""
        return self._status()

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    async def exist(self) -> None:
        """Never returns."""
        await asyncio.Event().wait()

    def _status(self) -> RankStatus:
        front, engine = self._front, self._engine
        if front is None or engine is None:
            state = "loading" if self._error is None else "failed"
            return RankStatus(os.getpid(), state, self._progress, error=self._error)
        return RankStatus(
            os.getpid(),
            front.report().state,
            self._progress,
            engine.since_progress_s(),
            front.num_live,
            front.num_streams,
            drained=self._drained,
            supervisor_pid=self._supervisor_pid,
            since_tick_s=front.since_tick_s(),
        )

    def _load(self) -> LoadedEngine:
        size = self._config.tensor_parallel_size
        if size == 1:
            return load_engine(self._config, self._note_progress)
        from ellm.worker.parallel.group import RankSpec, Timeouts

        timeouts = Timeouts(step_s=self._config.stall_s)
        spec = RankSpec(0, size, port=self._rendezvous.port, timeouts=timeouts)
        return load_engine(
            self._config,
            self._note_progress,
            spec=spec,
            rendezvous=self._rendezvous,
            on_failure=self._group_failed,
        )

    def _group_failed(self, error: Exception) -> None:
        """On a thread of the group: it has lost a rank. While it loads, `load` tells."""
        if self._engine is not None:
            self._engine_failed(error)

    def _note_progress(self, what: str, share: float) -> None:
        self._progress = (what, share)
        self._start.enter(what)

    def _info(self, loaded: LoadedEngine, rank_pids: tuple[int, ...]) -> WorkerInfo:
        limits, scheduler = loaded.executor.limits, loaded.core.config.scheduler
        return WorkerInfo(
            worker_id=self._worker_id,
            epoch=self._epoch,
            model=loaded.served_name,
            node=str(ray.get_runtime_context().get_node_id()),
            max_model_len=limits.max_model_len,
            block_size=limits.block_size,
            num_blocks=limits.num_blocks,
            vocab_size=limits.vocab_size,
            eos_token_ids=limits.eos_token_ids,
            device=loaded.device,
            dtype=loaded.dtype,
            deterministic=loaded.deterministic,
            tensor_parallel_size=self._config.tensor_parallel_size,
            rank_pids=rank_pids,
            memory=limits.memory,
            tpot_slo_s=None if scheduler.tpot_slo_ms is None else scheduler.tpot_slo_ms / 1000,
            ttft_slo_s=None if scheduler.ttft_slo_ms is None else scheduler.ttft_slo_ms / 1000,
            grammars=loaded.grammars is not None,
            start_s=self._start.seconds(),
        )

    def _engine_failed(self, error: BaseException) -> None:
        """On the engine's thread, or the data path's. The process ends: requests move, and the supervisor
        starts a new group."""
        log.critical("this rank has failed and ends: %r", error)
        time.sleep(0.2)  # for the log to get out
        logging.shutdown()
        os._exit(EXIT_FAILED)


def _listen() -> tuple[Any, int]:
    from ellm.worker.parallel.group import Rendezvous

    rendezvous = Rendezvous.listen()
    return rendezvous, rendezvous.port


def rank_actor() -> Any:
    """The actor class, with its event loops."""
    return ray.remote(concurrency_groups=CONCURRENCY_GROUPS, max_restarts=0, max_task_retries=0)(RankActor)
