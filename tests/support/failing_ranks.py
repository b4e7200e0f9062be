"""Mains of rank processes that go wrong, and of a rank 0 that nobody looks after."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection

import torch
from support import golden
from support.plans import PlanDriver

from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.engine.plan import BatchPlan
from ellm.worker.executor.local import LocalExecutor, LocalStep
from ellm.worker.parallel.follower import run_follower
from ellm.worker.parallel.group import RankSpec, Timeouts
from ellm.worker.parallel.local_group import LocalGroup


def busy(group: LocalGroup) -> PlanDriver:
    """A sequence that has begun to decode."""
    driver = PlanDriver(group.executor)
    driver.add(1, golden.prompt(40, 1))
    driver.generate(1, 3)
    return driver


def drive(config: WorkerConfig, timeouts: Timeouts, pipe: Connection) -> None:
    """Rank 0 with its followers: tells their pids, and executes steps until it is ended."""
    group = LocalGroup(config, timeouts=timeouts)
    pipe.send([process.pid for process in group.processes])
    driver = busy(group)
    while True:
        driver.step({1: 1})
        time.sleep(0.01)


def fail_to_load(config: WorkerConfig, spec: RankSpec) -> None:
    """A follower whose checkpoint cannot be read, and which goes on living."""

    def load(*_: object) -> LocalExecutor:
        raise ConfigError("the disk is on fire", param="model.path")

    LocalExecutor.load = staticmethod(load)  # type: ignore[method-assign,assignment]
    try:
        run_follower(config, spec)
    except ConfigError:
        time.sleep(60)


def fill_up(config: WorkerConfig, spec: RankSpec) -> None:
    """A follower whose device has no memory left at its twentieth step in service."""
    begin, served = LocalExecutor.begin, 0

    def begin_some(executor: LocalExecutor, plan: BatchPlan) -> LocalStep:
        nonlocal served
        served += 1
        if served == 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return begin(executor, plan)

    LocalExecutor.begin = begin_some  # type: ignore[method-assign]
    try:
        run_follower(config, spec)
    except torch.OutOfMemoryError:
        time.sleep(60)


def end_at_once(config: WorkerConfig, spec: RankSpec) -> None:
    raise SystemExit(3)
