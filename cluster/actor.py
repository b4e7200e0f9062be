"""The controller as a Ray actor: found by name, restarted by Ray, ended with the application.

Whoever asks for it first makes it and owns it (routers do, in `find_or_start`); with its owner it ends, and
the next router that misses it makes another. Terms are counted in Ray's control store, one key per term that
can be claimed once: a later controller has a higher one, whatever clocks say, and an earlier one that still
lives sees that the next term is claimed and ends itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from ellm.cluster.api import metrics
from ellm.cluster.api.config import ControllerConfig, ModelScale
from ellm.cluster.driver import Driver
from ellm.worker.api import json_log
from ellm.worker.api.actor_name import NAMESPACE
from ellm.worker.api.channel import WorkerDirectory
from ellm.worker.api.metric_export import PERIOD_S, MetricExport
from ellm.worker.api.wire import Message

log = logging.getLogger(__name__)

NAME = "ellm-controller"
_TERM = "ellm-controller-term"


class ControllerActor:
    """It begins with the first call: before a router asks there is nobody to advise."""

    def __init__(
        self,
        directory: Callable[[], WorkerDirectory],
        config: ControllerConfig,
        models: Sequence[ModelScale],
    ) -> None:
        json_log.install("controller")
        self._directory = directory
        self._config = config
        self._models = models
        self._driver: Driver | None = None
        self._starting = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None
        self._export: asyncio.Task[None] | None = None

    async def exchange(self, note: Message) -> Message | None:
        """A router's note for the newest guidance; see cluster/api/wire.py."""
        return (await self._started()).exchange(note)

    async def counters(self, message: Message) -> Message:
        """What a router has counted for what all have; see cluster/api/counters.py."""
        return (await self._started()).counters(message)

    async def targets(self, current: Mapping[str, int] | None = None) -> dict[str, int]:
        """Model -> how many workers it should have; models of which nobody has said a number are left out.
        `current`: how many were asked for so far, which a new controller goes on from."""
        driver = await self._started()
        driver.adopt(current or {})
        return dict(driver.targets)

    async def describe(self) -> dict[str, Any]:
        """Its process, its term, the workers that it hears, and how many there should be of each model."""
        driver = await self._started()
        found = {"pid": os.getpid(), "term": driver.term, "workers": driver.epochs()}
        return {**found, "targets": dict(driver.targets)}

    async def _started(self) -> Driver:
        async with self._starting:
            if self._driver is None:
                term = await asyncio.to_thread(claim_term)
                driver = Driver(self._directory(), self._config, self._models, term, _newest(term))
                await driver.start()
                self._driver = driver
                self._watch = asyncio.create_task(self._end_when_resigned(driver))
                self._export = asyncio.create_task(_export_forever(driver))
                log.info("controller %d has started", term)
        return self._driver

    async def _end_when_resigned(self, driver: Driver) -> None:
        await driver.resigned.wait()
        await driver.close()
        me = ray.get_runtime_context().current_actor
        await asyncio.to_thread(ray.kill, me, no_restart=True)


async def _export_forever(driver: Driver) -> None:
    """The controller's own metrics, through Ray."""
    from ray.util import metrics as ray_metrics

    export = MetricExport(ray_metrics, metrics.DECLARED)
    while True:
        try:
            export.update(dict(driver.gauges()))
        except Exception:  # nothing depends on it
            log.exception("metrics could not be exported")
        await asyncio.sleep(PERIOD_S)


def claim_term() -> int:
    """A term that is higher than all before, for this process alone."""
    term = int(_internal_kv_get(_TERM, namespace=NAMESPACE) or 0)
    while True:
        term += 1
        # True: the key was there.
        if not _internal_kv_put(f"{_TERM}:{term}", b"", overwrite=False, namespace=NAMESPACE):
            _internal_kv_put(_TERM, str(term).encode(), overwrite=True, namespace=NAMESPACE)  # a hint
            return term


def _newest(term: int) -> Callable[[], Any]:
    asked: asyncio.Task[bytes | None] | None = None

    async def newest_term() -> int:
        nonlocal asked
        if asked is None or asked.done():  # a store that does not answer shall not take a thread at each tick
            call = asyncio.to_thread(_internal_kv_get, f"{_TERM}:{term + 1}", namespace=NAMESPACE)
            asked = asyncio.create_task(call)
        claimed = await asyncio.shield(asked)
        return term if claimed is None else term + 1

    return newest_term


def find() -> Any | None:
    """The controller's handle; None where there is none. Blocks for a moment."""
    with contextlib.suppress(ValueError):
        return ray.get_actor(NAME, NAMESPACE)
    return None


def find_or_start(
    directory: Callable[[], WorkerDirectory], config: ControllerConfig, models: Sequence[ModelScale]
) -> Any:
    """The controller's handle. Where there is none, one is made, which lives as long as this process and the
    handle. Blocks for a moment."""
    actor = ray.remote(ControllerActor).options(
        name=NAME,
        namespace=NAMESPACE,
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,
    )
    return find() or actor.remote(directory, config, tuple(models))
