"""The supervisor: the Serve replica that stands for one worker group and holds no device.

It starts the rank in its own placement group, waits until it has loaded, pings it (which renews the rank's
lease) and answers Serve's health checks from what the pings say: a dead rank, a failed engine, or work
without a finished step for `stall_s` is unhealthy, and Serve then replaces the whole group. Requests never
pass through here. Serve sees none of them either, so on the way out the supervisor drains the worker itself,
and it always ends the rank's process before it goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
import uuid
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ellm.worker.actor import RankStatus, rank_actor
from ellm.worker.api.actor_name import NAMESPACE, actor_name
from ellm.worker.api.config import WorkerConfig, served_name
from ellm.worker.api.errors import ConfigError
from ellm.worker.watchdog import process_start

log = logging.getLogger(__name__)

DEPLOYMENT_NAME = "Worker"
PING_S = 2.0
LEASE_S = 30.0  # of the rank: so long may the supervisor be silent and alive
SILENCE_S = 10.0  # so long may the rank be silent
LAST_CALL_S = 2.0  # within which a rank that seems ill may prove that it is not
HEALTH_CHECK_PERIOD_S = 0.5  # Serve acts on the third failure in a row


class WorkerSupervisor:
    """The class behind the Serve deployment; `worker_application` makes it."""

    async def __init__(self, config: WorkerConfig, rank_resources: dict[str, float]) -> None:  # type: ignore[misc]
        """Returns when the rank serves. Raises ConfigError for a model or setting that cannot work."""
        self._config = config
        self._problem: str | None = None
        self._status: RankStatus | None = None
        self._pid_mark: tuple[int, str | None] | None = None
        self._ended = False
        self._heard_at = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []
        check_group(config)
        self.worker_id = f"w{serve.get_replica_context().rank.rank}"
        self.epoch = uuid.uuid4().hex[:12]
        self._rank = self._start_rank(rank_resources)
        self._tasks = [asyncio.create_task(self._ping_forever()), asyncio.create_task(self._watch())]
        await self._load()

    async def check_health(self) -> None:
        """Called by Serve; raises where the group must be replaced. Its rank is ended first: Serve starts the
        successor while this one is still leaving, and the two must not share a device."""
        problem = await self._confirmed_problem()
        if problem is not None:
            self._problem = problem
            await self._end_rank()
            raise RuntimeError(f"worker {self.worker_id} ({self.epoch}): {problem}")

    async def __del__(self) -> None:
        """Called by Serve before the replica goes: drain a worker that is well, then end the rank."""
        if not hasattr(self, "_rank") or self._ended:
            return
        if await self._confirmed_problem() is None and self._status_state() == "ready":
            try:
                done = await self._rank.drain.remote(self._config.drain_timeout_s)
                log.info("worker %s drained%s", self.epoch, "" if done else ": time is up")
            except RayError as error:
                log.warning("worker %s did not drain: %r", self.epoch, error)
        await self._end_rank()

    def _start_rank(self, resources: dict[str, float]) -> Any:
        options: dict[str, Any] = {
            "name": actor_name(served_name(self._config.model), self.worker_id, self.epoch),
            "namespace": NAMESPACE,
            "num_cpus": resources.get("CPU", 0),
            "num_gpus": resources.get("GPU", 0),
        }
        group = ray.util.get_current_placement_group()
        # A group is packed on one node: the rank can watch this very process, and the rank's pid is its own
        # here. Without one the rank may be anywhere, and its pid here a stranger's.
        self._same_node = group is not None
        if group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=0
            )
        supervisor_pid = os.getpid() if self._same_node else None
        return (
            rank_actor()
            .options(**options)
            .remote(self._config, self.worker_id, self.epoch, LEASE_S, supervisor_pid)
        )

    async def _load(self) -> None:
        try:
            loaded = await self._rank.load.remote()
            self._note(await self._rank.renew.remote())
        except RayError as error:
            await self._end_rank()
            raise RuntimeError(f"the rank of worker {self.worker_id} died while loading: {error}") from None
        if not loaded:
            assert self._status is not None
            code, message = self._status.error or ("internal_error", "loading failed")
            await self._end_rank()
            raise ConfigError(message) if code == ConfigError.code else RuntimeError(message)
        log.info("worker %s (%s) is ready, pid %d", self.worker_id, self.epoch, self._status_pid())

    async def _watch(self) -> None:
        """Hear of the rank's death at once: a call that never returns fails with it."""
        try:
            await self._rank.exist.remote()
        except RayError as error:
            log.warning("the rank of worker %s is dead: %s", self.worker_id, error)
            self._problem = "the rank is dead"

    async def _ping_forever(self) -> None:
        shown: tuple[str, float] | None = None
        while self._problem is None:
            with contextlib.suppress(RayError, TimeoutError):  # its silence is measured, its death watched
                self._note(await asyncio.wait_for(self._rank.renew.remote(), SILENCE_S))
            progress = self._status.progress if self._status else None
            if progress != shown and progress is not None and self._status_state() == "loading":
                log.info("worker %s: %s %.0f %%", self.worker_id, progress[0], 100 * progress[1])
                shown = progress
            await asyncio.sleep(min(PING_S, self._config.stall_s / 4))

    def _note(self, status: RankStatus) -> None:
        self._status = status
        self._heard_at = time.monotonic()
        if self._same_node and self._pid_mark is None:
            self._pid_mark = (status.pid, process_start(status.pid))

    def _status_state(self) -> str:
        return "loading" if self._status is None else self._status.state

    def _status_pid(self) -> int:
        return 0 if self._status is None else self._status.pid

    async def _confirmed_problem(self) -> str | None:
        """What is wrong with the group by a reading that is not old: this process may itself have stood still
        since the last one."""
        problem = self._diagnose()
        if problem is not None and self._problem is None:
            with contextlib.suppress(RayError, TimeoutError):
                self._note(await asyncio.wait_for(self._rank.renew.remote(), LAST_CALL_S))
            problem = self._diagnose()
        return problem

    def _diagnose(self) -> str | None:
        """What is wrong with the group by what is known, None if nothing is."""
        if self._problem is not None:
            return self._problem
        silent = time.monotonic() - self._heard_at
        if silent > min(SILENCE_S, self._config.stall_s):
            return f"the rank has not answered for {silent:.0f} s"
        status = self._status
        if status is None or status.state == "loading":
            return None
        if status.state == "failed":
            return "the engine failed"
        if status.since_progress_s > self._config.stall_s:
            return f"no step finished for {status.since_progress_s:.0f} s although there is work"
        return None

    async def _end_rank(self) -> None:
        """Nothing of the rank is left when this returns, where it ran on this node."""
        if self._ended:
            return
        self._ended = True
        for task in self._tasks:
            task.cancel()
        ray.kill(self._rank, no_restart=True)
        if self._pid_mark is None:
            return
        pid, mark = self._pid_mark
        if mark is not None and process_start(pid) == mark:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # a frozen process would not read Ray's message
        deadline = time.monotonic() + 5.0
        while mark is not None and process_start(pid) == mark and time.monotonic() < deadline:
            await asyncio.sleep(0.02)


def check_group(config: WorkerConfig) -> None:
    """Raise ConfigError for a group that cannot be built yet."""
    if config.tensor_parallel_size != 1:
        raise ConfigError(
            f"tensor_parallel_size = {config.tensor_parallel_size}: only 1 is supported so far",
            param="worker.tensor_parallel_size",
        )


def worker_application(
    config: WorkerConfig, *, num_workers: int, rank_cpus: float, rank_gpus: float = 0
) -> serve.Application:
    """The Serve application of `num_workers` groups. Raises ConfigError for a group that cannot be built."""
    check_group(config)
    resources = {name: n for name, n in (("CPU", rank_cpus), ("GPU", rank_gpus)) if n}
    deployment = serve.deployment(
        WorkerSupervisor,
        name=DEPLOYMENT_NAME,
        num_replicas=num_workers,
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=[resources] if resources else None,
        placement_group_strategy="STRICT_PACK" if resources else None,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=30.0,
        # Serve kills what has not gone by then; draining takes the worker's own limit at most.
        graceful_shutdown_timeout_s=config.drain_timeout_s + 15.0,
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=3,
    )
    application: serve.Application = deployment.bind(config, resources)
    return application
