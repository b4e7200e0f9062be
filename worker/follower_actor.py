"""The actor of ranks 1, 2, ... of a tensor-parallel group: one process with a part of the model.

It decides nothing: it meets the others, loads, and computes what rank 0 says until the group ends, and then
its process ends, too. Like rank 0 it is watched: it ends when its supervisor is gone or silent.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from typing import Any

import ray

from ellm.worker.actor import CONCURRENCY_GROUPS, EXIT_FAILED, RankStatus
from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.errors import EllmError
from ellm.worker.primitive_cache import bound_primitive_caches
from ellm.worker.watchdog import Watchdog

log = logging.getLogger(__name__)

LAST_WORDS_S = 5.0  # so long it can still be asked why it has ended


class FollowerActor:
    """One rank that follows rank 0; see `follower_actor` for how it is made."""

    def __init__(self, config: WorkerConfig, rank: int, lease_s: float, supervisor_pid: int | None) -> None:
        self._config = config
        self._rank = rank
        self._watchdog = Watchdog(lease_s, () if supervisor_pid is None else (supervisor_pid,))
        self._progress = ("starting", 0.0)
        self._state = "loading"
        self._error: tuple[str, str] | None = None

    async def open(self) -> int:
        """Its pid."""
        return os.getpid()

    async def follow(self, port: int) -> tuple[str, str]:
        """Load and compute until the group ends; (code, message) of why. The process ends soon after."""
        self._error = await asyncio.to_thread(self._run, port)
        self._state = "failed"
        ending = threading.Timer(LAST_WORDS_S, os._exit, (EXIT_FAILED,))
        ending.daemon = True
        ending.start()
        return self._error

    def _run(self, port: int) -> tuple[str, str]:
        try:
            bound_primitive_caches()
            from ellm.worker.parallel.follower import run_follower
            from ellm.worker.parallel.group import RankSpec, Timeouts

            timeouts = Timeouts(step_s=self._config.stall_s)
            spec = RankSpec(self._rank, self._config.tensor_parallel_size, port=port, timeouts=timeouts)
            run_follower(self._config, spec, self._note_progress)
        except EllmError as error:
            return error.code, error.message
        except Exception as error:  # the edge: whatever a device throws ends the group
            log.exception("rank %d fails", self._rank)
            return EllmError.code, str(error) or repr(error)
        return EllmError.code, "rank 0 has left the group"

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    async def renew(self) -> RankStatus:
        """Renew the lease; returns how the rank is."""
        self._watchdog.renew()
        return RankStatus(os.getpid(), self._state, self._progress, error=self._error)

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    async def status(self) -> RankStatus:
        """How the rank is."""
        return RankStatus(os.getpid(), self._state, self._progress, error=self._error)

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    async def exist(self) -> None:
        """Never returns."""
        await asyncio.Event().wait()

    def _note_progress(self, what: str, share: float) -> None:
        self._progress = (what, share)


def follower_actor() -> Any:
    """The actor class, with its event loops."""
    return ray.remote(concurrency_groups=CONCURRENCY_GROUPS, max_restarts=0, max_task_retries=0)(
        FollowerActor
    )
