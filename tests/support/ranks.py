"""Tensor-parallel groups for tests: follower processes that are started once and join one group after
another."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection

from ellm.worker.api.config import WorkerConfig
from ellm.worker.executor.tensor_parallel import TensorParallelExecutor
from ellm.worker.parallel.follower import run_follower
from ellm.worker.parallel.group import Group, RankSpec, Rendezvous, Timeouts

Around = Callable[[int], AbstractContextManager[object]]  # of a rank's number; travels to its process
TIMEOUTS = Timeouts(start_s=120.0, step_s=60.0, heartbeat_s=0.5)  # a loaded machine is no failure


def undisturbed(rank: int) -> AbstractContextManager[object]:
    return contextlib.nullcontext()


def follow_forever(pipe: Connection) -> None:
    """A follower's main: join the groups that are named to it, and tell how each has ended."""
    while (job := pipe.recv()) is not None:
        config, spec, around = job
        try:
            with around(spec.rank):
                run_follower(config, spec)
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
        else:
            pipe.send("closed")


class RankPool:
    """Up to `size` ranks: the test's own process is rank 0."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self.processes = []
        for _ in range(size - 1):
            here, there = context.Pipe()
            process = context.Process(target=follow_forever, args=(there,), daemon=True)
            process.start()
            self._pipes.append(here)
            self.processes.append(process)

    @contextlib.contextmanager
    def group(
        self, config: WorkerConfig, timeouts: Timeouts = TIMEOUTS, around: Around = undisturbed
    ) -> Iterator[TensorParallelExecutor]:
        """A group of config.tensor_parallel_size ranks; every follower has left it at the end. `around`: each
        rank runs within what it gives for its number."""
        size = config.tensor_parallel_size
        pipes = self._pipes[: size - 1]
        rendezvous = Rendezvous.listen()
        for rank, pipe in enumerate(pipes, 1):
            pipe.send((config, RankSpec(rank, size, port=rendezvous.port, timeouts=timeouts), around))
        try:
            with around(0):
                group = Group.join(RankSpec(0, size, port=rendezvous.port, timeouts=timeouts), rendezvous)
                executor = TensorParallelExecutor.load(config, group)
                try:
                    yield executor
                finally:
                    executor.close()
        finally:
            self.ends = [pipe.recv() if pipe.poll(60.0) else "still there" for pipe in pipes]

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self.processes, strict=True):
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(10.0)
            process.kill()
            process.join()
