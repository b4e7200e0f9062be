"""The thread that computes plans, one after the other.

Where the executor can be asked for a step before the one before has been read, the device always has the next
one queued, and need not wait for what the host does between two steps. It knows no engine and no requests.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

from ellm.worker.executor.base import (
    BatchPlan,
    BeginningExecutor,
    BegunStep,
    EndedStep,
    Executor,
    StepResult,
)
from ellm.worker.executor.end_watch import EndWatch


def beginning(executor: Executor) -> Callable[[BatchPlan], BegunStep]:
    """How a step is begun; an executor that cannot begin has ended it by then."""
    if isinstance(executor, BeginningExecutor):
        return executor.begin
    return lambda plan: EndedStep(executor.execute(plan))


@dataclass(frozen=True, slots=True, eq=False)
class _Begun:
    at: float
    step: BegunStep


_Mail = BatchPlan | _Begun | None  # a plan; a step that has ended; the end


class StepThread:
    """Runs plans in their order and tells each result; the first error, which ends it."""

    def __init__(
        self,
        executor: Executor,
        tell: Callable[[StepResult], None],
        crash: Callable[[Exception], None],
        min_step_s: float = 0.0,
    ) -> None:
        """`tell` and `crash` are called by this thread."""
        self._begin = beginning(executor)
        self._tell, self._crash = tell, crash
        self._min_step_s = min_step_s
        self._told_at = 0.0
        self._mail: SimpleQueue[_Mail] = SimpleQueue()
        self._watch = EndWatch("ellm-step-end")
        self._watched: _Begun | None = None  # whose end will be told
        self._thread = threading.Thread(target=self._run, name="ellm-step", daemon=True)
        self._thread.start()

    def start(self, plan: BatchPlan) -> None:
        self._mail.put(plan)

    def stop(self, *, wait: bool) -> None:
        """End after the plans that were started; a device that hangs is not waited for."""
        self._mail.put(None)
        if wait:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._compute()
        except Exception as error:  # the edge: whatever a device throws ends the worker
            self._crash(error)
        finally:
            self._watch.stop()

    def _compute(self) -> None:
        running: _Begun | None = None
        while True:
            if running is not None and running.step.ended:
                self._finish(running)
                running = None
            mail = self._next(running)
            if isinstance(mail, _Begun):
                if mail is running:  # else it has been read meanwhile
                    self._finish(mail)
                    running = None
                continue
            if running is not None and (mail is None or _reads_first(running.step, mail)):
                self._finish(running)
                running = None
            if mail is None:
                return
            at = time.monotonic()
            try:
                step = self._begin(mail)
            finally:  # what had been asked for before is told even if this cannot be
                if running is not None:
                    self._finish(running)
            running = _Begun(at, step)

    def _next(self, running: _Begun | None) -> _Mail:
        """What comes next: a plan, or the end of the step that runs."""
        if running is not None and running is not self._watched and self._mail.empty():
            self._watched = running
            self._watch.tell(running.step.wait, lambda: self._mail.put(running))
        return self._mail.get()

    def _finish(self, begun: _Begun) -> None:
        self._watched = None  # what a step holds is not kept until the next
        result = begun.step.result()
        left_s = max(begun.at, self._told_at) + self._min_step_s - time.monotonic()
        if left_s > 0.0:
            time.sleep(left_s)
        self._told_at = time.monotonic()
        self._tell(result)


def _reads_first(running: BegunStep, plan: BatchPlan) -> bool:
    """Whether `plan` must not begin before the one that runs has been read: where it depends on that, has
    nothing to run, or waits for the device as it begins, as the scores of a prompt do."""
    return (
        running.feeds_back
        or plan.waits
        or not plan.entries
        or any(entry.prompt_logprobs for entry in plan.entries)
    )
