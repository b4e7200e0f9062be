"""The supervisor: the Serve replica that stands for one worker group and holds no device.

It starts the ranks in its own placement group (worker/rank_group.py), waits until they have loaded, and
answers Serve's health checks from what their pings say: a dead rank, a failed engine, or work without a
finished step for `stall_s` is unhealthy; the group is ended at once and Serve replaces it whole. Requests
never pass through here. Serve sees none of them either, so on the way out the supervisor drains the worker
itself, and it always ends the ranks before it goes. A worker that fails again and again waits before it tries
again.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from hashlib import blake2b
from typing import Any

from ray import serve
from ray.exceptions import RayError

from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.rank_group import RankGroup
from ellm.worker.restart_pause import GOOD_S, FailureCount, pause_s

log = logging.getLogger(__name__)

DEPLOYMENT_NAME = "Worker"
HEALTH_CHECK_PERIOD_S = 0.5  # Serve acts on the third failure in a row


class WorkerSupervisor:
    """The class behind the Serve deployment; `worker_application` makes it."""

    async def __init__(self, config: WorkerConfig, rank_resources: dict[str, float]) -> None:  # type: ignore[misc]
        """Returns when the group serves. Raises ConfigError for a model or setting that cannot work."""
        self._config = config
        self._group: RankGroup | None = None
        self._ended = False
        self._proven = False  # it has served for a while
        check_group(config)
        self.worker_id = f"w{serve.get_replica_context().rank.rank}"
        self.epoch = uuid.uuid4().hex[:12]
        self._failures = FailureCount(_key(config, self.worker_id))
        pause = pause_s(await self._failures.read())
        if pause:
            log.warning("worker %s has failed again and again: it waits %.0f s", self.worker_id, pause)
            await asyncio.sleep(pause)
        self._group = RankGroup(config, self.worker_id, self.epoch, rank_resources)
        try:
            await self._group.load()
        except (ConfigError, RuntimeError):
            await self._failures.failed()
            raise
        self._ready_at = time.monotonic()
        log.info("worker %s (%s) is ready, pids %s", self.worker_id, self.epoch, self._group.pids)

    async def check_health(self) -> None:
        """Called by Serve; raises where the group must be replaced. Its ranks are ended first: Serve starts
        the successor while this one is still leaving, and the two must not share a device."""
        group = self._group
        assert group is not None
        problem = await group.confirmed_problem()
        if problem is None:
            await self._note_good()
            return
        first, self._ended = not self._ended, True
        await group.end()
        if first and not self._proven:
            await self._failures.failed()
        raise RuntimeError(f"worker {self.worker_id} ({self.epoch}): {problem}")

    async def __del__(self) -> None:
        """Called by Serve before the replica goes: drain a worker that is well, or wait until it is drained,
        then end the ranks."""
        group = getattr(self, "_group", None)
        if group is None:
            return
        well = not self._ended and await group.confirmed_problem() is None
        if well and group.state in ("ready", "draining"):  # draining: on somebody's request already
            try:
                done = await group.drain(self._config.drain_timeout_s)
                log.info("worker %s drained%s", self.epoch, "" if done else ": time is up")
            except RayError as error:
                log.warning("worker %s did not drain: %r", self.epoch, error)
        await group.end()

    async def _note_good(self) -> None:
        if not self._proven and time.monotonic() - self._ready_at >= GOOD_S:
            self._proven = True
            await self._failures.succeeded()


def _key(config: WorkerConfig, worker_id: str) -> str:
    """Of the failures of this worker with this very config."""
    return f"{worker_id}:{blake2b(repr(config).encode(), digest_size=8).hexdigest()}"


def check_group(config: WorkerConfig) -> None:
    """Raise ConfigError for a group that cannot be."""
    if config.tensor_parallel_size < 1:
        raise ConfigError(
            f"tensor_parallel_size = {config.tensor_parallel_size}: it must be at least 1",
            param="worker.tensor_parallel_size",
        )


def worker_application(
    config: WorkerConfig,
    *,
    num_workers: int,
    rank_cpus: float,
    rank_gpus: float = 0,
    name: str = DEPLOYMENT_NAME,
    autoscaling: Any = None,
) -> serve.Application:
    """The Serve application of `num_workers` groups, or of as many as Serve's `autoscaling` config says.
    Raises ConfigError for a group that cannot be built."""
    check_group(config)
    resources = {name: n for name, n in (("CPU", rank_cpus), ("GPU", rank_gpus)) if n}
    if config.tensor_parallel_size > 1 and not resources:
        raise ConfigError("a group of several ranks needs resources: it is placed by them", param="worker")
    bundles: list[dict[str, float]] | None = [dict(resources) for _ in range(config.tensor_parallel_size)]
    options: dict[str, Any] = {"placement_group_bundles": bundles, "placement_group_strategy": "STRICT_PACK"}
    deployment = serve.deployment(
        WorkerSupervisor,
        name=name,
        num_replicas=num_workers if autoscaling is None else None,
        autoscaling_config=autoscaling,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=30.0,
        # Serve kills what has not gone by then; draining takes the worker's own limit at most.
        graceful_shutdown_timeout_s=config.drain_timeout_s + 15.0,
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=3,
        **(options if resources else {}),
    )
    application: serve.Application = deployment.bind(config, resources)
    return application
