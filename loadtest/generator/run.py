"""One run: a plan cut up between sender processes that start at the same moment, and what they bring back."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from ellm.loadtest.generator.live import Progress, summed
from ellm.loadtest.generator.options import Options
from ellm.loadtest.generator.plan import PlannedSession, make_plan
from ellm.loadtest.generator.record import Record
from ellm.loadtest.generator.sender import run_sender
from ellm.loadtest.generator.target import Target
from ellm.worker.api.errors import EllmError

RATE_PER_PROCESS = 1_500.0  # requests per second that one process is given
TOKENS_PER_PROCESS = 60_000.0  # streamed tokens per second, the same
START_S = 0.3  # until the common start, once all are ready
READY_S = 300.0


class GeneratorFailed(EllmError):
    """A sender process died."""


@dataclass(slots=True)
class Run:
    """What was asked for and what became of it."""

    options: Options
    target: Target
    records: list[Record]
    processes: int
    started_at: float  # Unix time of the run's zero
    cpu_s: float  # of all senders
    interrupted: bool = False
    workers: list[dict[str, Any]] = field(
        default_factory=list
    )  # memory states over time, of a server of ours


def run_once(
    options: Options,
    target: Target,
    on_progress: Callable[[Progress], None] | None = None,
    sampler: Callable[[float], list[dict[str, Any]] | None] | None = None,
    cpus: tuple[int, ...] = (),
) -> Run:
    """Plan, send, and wait for the last answer. Ctrl-C ends it early with what there is.

    `sampler(monotonic start)` is called twice a second while it runs and gives rows for `Run.workers`; `cpus`
    pins sender i to one of them. Raises ConfigError, GeneratorFailed.
    """
    plan = make_plan(options)
    count = min(len(plan), options.processes or needed_processes(options, plan))
    shares = [plan[i::count] for i in range(count)]
    with _senders(target, options, shares, cpus) as pipes:
        for pipe in pipes:
            _expect_ready(pipe)
        start_s, started_at = time.monotonic() + START_S, time.time() + START_S
        for pipe in pipes:
            pipe.send(start_s)
        gathering = _Gathering(pipes, on_progress, sampler, start_s)
        gathering.all()
    records = sorted(gathering.records, key=lambda record: (record.due_s, record.index))
    return Run(
        options, target, records, count, started_at, gathering.cpu_s, gathering.interrupted, gathering.workers
    )


def needed_processes(options: Options, plan: list[PlannedSession]) -> int:
    """From the plan's mean rate and tokens; never more than there are cores."""
    span = max(plan[-1].due_s, 1.0)
    turns = sum(len(session.turns) for session in plan)
    tokens = sum(turn.output_tokens for session in plan for turn in session.turns)
    wanted = max(turns / span / RATE_PER_PROCESS, tokens / span / TOKENS_PER_PROCESS)
    return max(1, min(len(os.sched_getaffinity(0)), -int(-wanted // 1)))


@contextmanager
def _senders(
    target: Target, options: Options, shares: list[list[PlannedSession]], cpus: tuple[int, ...]
) -> Iterator[list[Connection]]:
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for number, share in enumerate(shares):
            ours, theirs = context.Pipe()
            cpu = cpus[number % len(cpus)] if cpus else None
            process: BaseProcess = context.Process(
                target=run_sender, args=(theirs, target, options, share, cpu), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        yield pipes
    finally:
        for process, pipe in zip(processes, pipes, strict=True):
            pipe.close()
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()


def _expect_ready(pipe: Connection) -> None:
    try:
        if not pipe.poll(READY_S):
            raise GeneratorFailed("a sender process did not get ready")
        pipe.recv()
    except EOFError:
        raise GeneratorFailed("a sender process ended before it began; its error stands above") from None


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """The first Ctrl-C only adds to the list, so that no message is read by halves; the next one raises."""
    seen: list[int] = []

    def note(number: int, _: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


class _Gathering:
    """Reads the senders' messages to their end."""

    def __init__(
        self,
        pipes: list[Connection],
        on_progress: Callable[[Progress], None] | None,
        sampler: Callable[[float], list[dict[str, Any]] | None] | None,
        start_s: float,
    ) -> None:
        self._pipes = pipes
        self._parts = {pipe: Progress() for pipe in pipes}
        self._on_progress = on_progress
        self._sampler = sampler
        self._start_s = start_s
        self._looked = 0.0
        self.records: list[Record] = []
        self.workers: list[dict[str, Any]] = []
        self.interrupted = False

    @property
    def cpu_s(self) -> float:
        return sum(part.cpu_s for part in self._parts.values())

    def all(self) -> None:
        open_pipes = set(self._pipes)
        with _interrupts() as interrupts:
            while open_pipes:
                self._look(open_pipes)
                if interrupts and not self.interrupted:
                    self.interrupted = True
                    for pipe in open_pipes:
                        pipe.send("stop")

    def _look(self, open_pipes: set[Connection]) -> None:
        for pipe in wait(list(open_pipes), 0.25):
            assert isinstance(pipe, Connection)
            try:
                message = pipe.recv()
            except EOFError:
                raise GeneratorFailed("a sender process died; its error stands above") from None
            if message[0] == "records":
                self.records += message[1]
                open_pipes.discard(pipe)
            else:
                self._parts[pipe] = message[1]
        now = time.monotonic()
        if now - self._looked < 0.5:
            return
        self._looked = now
        if self._on_progress is not None:
            self._on_progress(summed(list(self._parts.values())))
        if self._sampler is not None:
            self.workers += self._sampler(self._start_s) or []
