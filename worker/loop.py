"""EngineLoop: the thread that owns an EngineCore, and the thread that computes its plans.

Everything that happens reaches the loop through one mailbox: submissions and aborts of any thread, and the
results of the step thread. The loop plans as far ahead as the core's depth allows, hands plans over and takes
results back in order, and publishes what is new once per step. It knows wall-clock time and threads, and
neither routers' streams nor Ray. An exception below it ends it: the state becomes "failed" and `on_failure`
is called once; nothing is answered any more, so that routers move their requests.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Literal

from ellm.worker.api.errors import EllmError
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.report import WorkerReport
from ellm.worker.api.request import EngineRequest
from ellm.worker.engine.core import EngineCore
from ellm.worker.executor.base import BatchPlan, Executor, GrammarCompiler, StepResult
from ellm.worker.grammar_gate import GrammarGate, refusal
from ellm.worker.step_thread import StepThread

log = logging.getLogger(__name__)

LoopState = Literal["new", "running", "stopped", "failed"]
Publish = Callable[[list[SequenceOutput]], None]
HURRY_S = 0.02  # a report made for a change is at least so much younger than the one before
HURRY_PERIOD_S = 0.1  # from one report that is passed on at once to the next


@dataclass(frozen=True, slots=True)
class _Submit:
    router_id: str
    seq: int
    requests: Sequence[EngineRequest]


@dataclass(frozen=True, slots=True)
class _Compiled:
    request: EngineRequest
    error: EllmError | None


@dataclass(frozen=True, slots=True)
class _Abort:
    ids: Sequence[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class _Forget:
    router_id: str


@dataclass(frozen=True, slots=True)
class _HandBack:
    everybody: bool


@dataclass(frozen=True, slots=True)
class _Done:
    result: StepResult


@dataclass(frozen=True, slots=True)
class _Crash:
    error: Exception


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Mail = _Submit | _Compiled | _Abort | _Forget | _HandBack | _Done | _Crash | _Stop


class EngineLoop:
    """`submit`, `abort`, `forget_router`, `stop` and the properties may be used from any thread."""

    def __init__(
        self,
        core: EngineCore,
        executor: Executor,
        *,
        report_s: float = 0.1,
        on_failure: Callable[[BaseException], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """`report_s`: how old `report` may become. Without `grammars` requests that have one are refused."""
        self._gate = GrammarGate(grammars, lambda *compiled: self._mailbox.put(_Compiled(*compiled)))
        self._core = core
        self._executor = executor
        self._report_s = report_s
        self._on_failure = on_failure
        self._clock = clock
        self._mailbox: SimpleQueue[_Mail] = SimpleQueue()
        self._publish: Publish = lambda outputs: None
        self._hurry: Callable[[], None] = lambda: None
        self._outstanding: deque[BatchPlan] = deque()
        self._submit_seqs: dict[str, int] = {}
        self._stopping = False
        self._draining = False
        self._busy = False
        self._progress_at = self._report_at = clock()
        self._hurried_at = self._progress_at - HURRY_PERIOD_S
        self._pressure = core.pressure
        self._submitted = False  # since the last report
        self._thread = threading.Thread(target=self._guarded_run, name="ellm-engine", daemon=True)
        self.state: LoopState = "new"
        self.failure: BaseException | None = None
        self.report: WorkerReport = core.report(self._progress_at)  # at most report_s old while the loop runs

    def start(self, publish: Publish, hurry: Callable[[], None] | None = None) -> None:
        """Begin. The loop's thread calls `publish` with each step's outputs, and with refusals at once; it
        calls `hurry` when `report` says something that should be passed on at once."""
        self._publish = publish
        self._hurry = hurry or self._hurry
        self.state = "running"
        self._thread.start()

    def submit(self, router_id: str, seq: int, requests: Sequence[EngineRequest]) -> None:
        """Queue requests; `seq` is echoed in the first report that knows them."""
        self._mailbox.put(_Submit(router_id, seq, requests))

    def abort(self, ids: Sequence[tuple[str, int]]) -> None:
        """End (request id, attempt) pairs; no output of theirs follows once the loop has read this."""
        self._mailbox.put(_Abort(ids))

    def hand_back(self, *, everybody: bool) -> None:
        """End those who wait or are parked, now and from now on, with an output that says so: their routers
        move them. With `everybody` those who run, too."""
        self._mailbox.put(_HandBack(everybody))

    def forget_router(self, router_id: str) -> None:
        """Echo no submit number of this router any more."""
        self._mailbox.put(_Forget(router_id))

    def stop(self, timeout_s: float | None = None) -> bool:
        """Finish the plans that run, then end and close the executor. True if that happened in time."""
        if self.state == "new":
            self._executor.close()
            self.state = "stopped"
            return True
        self._mailbox.put(_Stop())
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def num_outstanding(self) -> int:
        """Plans that were handed over and have not come back."""
        return len(self._outstanding)

    def since_progress_s(self) -> float:
        """How long there has been work and no finished step; 0 while there is nothing to do."""
        if self.state != "running" or not (self._busy or not self._mailbox.empty()):
            return 0.0
        return max(0.0, self._clock() - self._progress_at)

    def _guarded_run(self) -> None:
        post = self._mailbox.put
        steps = StepThread(
            self._executor,
            lambda result: post(_Done(result)),
            lambda error: post(_Crash(error)),
            self._core.config.min_step_s,
        )
        try:
            while not self._stopping or self._outstanding:
                self._turn(steps)
            steps.stop(wait=True)
            self._executor.close()
            self.state = "stopped"
        except Exception as error:  # the edge: a broken invariant or a device error ends the worker
            log.exception("the engine failed")
            steps.stop(wait=False)
            self.failure = error
            self.state = "failed"
            if self._on_failure is not None:
                self._on_failure(error)

    def _turn(self, steps: StepThread) -> None:
        """Wait for mail, act on all of it, plan what can be planned."""
        for mail in self._read():
            self._act(mail)
        now = self._clock()
        if self._draining:
            self._give_back(now, everybody=False)
        while not self._stopping and (plan := self._core.begin_step(now)) is not None:
            self._outstanding.append(plan)
            steps.start(plan)
        self._busy = self._core.has_work
        if not self._busy:
            self._progress_at = now
        pressure, age_s = self._core.pressure, now - self._report_at
        hurries = age_s >= HURRY_S and now - self._hurried_at >= HURRY_PERIOD_S
        changed = hurries and pressure != self._pressure
        if changed or age_s >= self._report_s or (self._submitted and age_s >= HURRY_S):
            self._pressure, self._submitted = pressure, False
            self._renew_report(now)
        if changed:
            self._hurried_at = now
            self._hurry()

    def _read(self) -> Iterator[_Mail]:
        """All mail there is; waits for the first, and not longer than a report may age."""
        try:
            yield self._mailbox.get(timeout=self._report_s)
        except Empty:
            return
        while not self._mailbox.empty():  # no one else reads it
            yield self._mailbox.get_nowait()

    def _act(self, mail: _Mail) -> None:
        match mail:
            case _Done(result):
                self._finish(result)
            case _Submit(router_id, seq, requests):
                self._add([request for request in requests if not self._gate.holds(request)])
                self._submit_seqs[router_id] = max(seq, self._submit_seqs.get(router_id, -1))
                self._submitted = True  # load has changed: say so soon
            case _Compiled(request, error):
                self._add([request], error)
            case _Abort(ids):
                now = self._clock()
                for request_id, attempt in ids:
                    self._core.abort(request_id, attempt, now)
            case _HandBack(everybody):
                self._draining = True
                self._give_back(self._clock(), everybody=everybody)
            case _Forget(router_id):
                self._submit_seqs.pop(router_id, None)
            case _Crash(failure):
                raise failure
            case _Stop():
                self._stopping = True

    def _finish(self, result: StepResult) -> None:
        now = self._clock()
        outputs = self._core.finish_step(self._outstanding.popleft(), result, now)
        self._progress_at = now
        if outputs:
            self._publish(outputs)

    def _add(self, requests: Sequence[EngineRequest], known: EllmError | None = None) -> None:
        """`known`: an error that was found before."""
        refused = []
        now = self._clock()
        for request in requests:
            try:
                if known is not None:
                    raise known
                self._core.add_request(request, now)
            except EllmError as error:
                refused.append(refusal(request, error))
        if refused:
            self._publish(refused)

    def _give_back(self, now: float, *, everybody: bool) -> None:
        outputs = self._core.hand_back(now, everybody=everybody)
        if outputs:
            self._publish(outputs)

    def _renew_report(self, now: float) -> None:
        self._report_at = now
        self.report = replace(self._core.report(now), last_submit_seq=tuple(self._submit_seqs.items()))
