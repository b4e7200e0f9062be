"""Several replicas and several routers in simulated time: the real engine cores, the real routing policies.

A request comes to a router at random, its policy chooses, the request is at the worker a hop later. Each
worker sends its report every `report_s`, at a phase of its own, to all routers at once; it is there
`report_delay_s` later. What the report says, how a router corrects it by what it has sent, and who is chosen
is all done by the code that serves, the controller's advice included (cluster_control.py). The cluster
decides nothing.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from random import Random
from time import thread_time

from ellm.loadtest.sim.cluster_control import SimControl
from ellm.loadtest.sim.cluster_setting import ClusterSetting
from ellm.loadtest.sim.replica import Replica, SimulationError
from ellm.loadtest.sim.workload import SimRequest
from ellm.router.policies import Replica as View
from ellm.router.policies import RoutedRequest, RoutingPolicy
from ellm.router.policies.base import OUTPUT_TOKENS
from ellm.worker.api.report import WorkerReport
from ellm.worker.engine.core import EngineCore

LENGTH_SMOOTHING = 0.02  # as the router's dispatcher does
_SESSION_PLACE = 1  # of the hash id that names a conversation: the first is the prompt all have in common


@dataclass(slots=True)
class ClusterRun:
    """What happened. Lists are by request, then by worker."""

    token_times: list[array[float]]
    chosen: list[int]  # worker of each request
    cached_tokens: list[int]  # of each prompt, found by its worker
    guessed_tokens: list[int]  # what the router thought
    reports: list[WorkerReport]  # the last of each worker
    reasons: dict[str, int] = field(default_factory=dict)
    decisions_s: float = 0.0  # CPU time of all choices
    digest_bytes: int = 0  # of all reports that were sent
    num_reports: int = 0
    cpu_s: float = 0.0


class SimRouter:
    """What a router's dispatcher and links keep, without their tasks."""

    def __init__(self, name: str, num_workers: int, policy: RoutingPolicy) -> None:
        self.name = name
        self.policy = policy
        self.views = [View(f"w{number}") for number in range(num_workers)]
        self.output_tokens: float = OUTPUT_TOKENS
        self._numbers = {view.replica_id: number for number, view in enumerate(self.views)}
        self._seqs = [0] * num_workers

    def route(self, request: RoutedRequest, now: float) -> tuple[int, int, str, int]:
        """(worker, submission's number, reason, tokens thought cached)."""
        choice = self.policy.choose(replace(request, output_tokens=self.output_tokens), self.views, now)
        if choice is None:
            raise SimulationError(f"{self.name} knows no worker")
        number = self._numbers[choice.replica_id]
        tokens = len(request.prompt_ids)
        rows = max(1, tokens - choice.cached_tokens)
        self._seqs[number] += 1
        view = self.views[number]
        view.place(1, rows, tokens)
        view.sent(self._seqs[number], 1, rows, tokens, now)
        return number, self._seqs[number], choice.reason, choice.cached_tokens

    def ended(self, output_tokens: int) -> None:
        self.output_tokens += LENGTH_SMOOTHING * (output_tokens - self.output_tokens)


class Cluster:
    """One run. `policies`: one for each router."""

    def __init__(
        self,
        setting: ClusterSetting,
        requests: list[SimRequest],
        policies: Sequence[RoutingPolicy],
        seed: int = 0,
    ) -> None:
        self._setting = setting
        self._requests = requests
        shares = any(request.hash_ids for request in requests)
        num = len(setting.workers)
        times = {str(i): array("d") for i in range(len(requests))}
        self._cores: list[EngineCore] = [setting.core(n, shares=shares) for n in range(num)]
        self._replicas = [
            Replica(
                self._cores[n],
                setting.executor(n, requests),
                requests,
                tpot_slo_s=setting.tpot_slo_s,
                ttft_slo_s=setting.ttft_slo_s,
            )
            for n in range(num)
        ]
        for replica in self._replicas:
            replica.times, replica.watches = times, False
        self._times = times
        self._routers = [SimRouter(f"r{i}", num, policy) for i, policy in enumerate(policies)]
        self._router_of = [Random(f"{seed} {i}").randrange(len(policies)) for i in range(len(requests))]
        self._seen: list[dict[str, int]] = [{} for _ in range(num)]  # newest submission of each router
        self._events: list[tuple[float, int, str, tuple[int, ...] | tuple[int, WorkerReport]]] = []
        self._order = count()
        self._left = len(requests)
        infos = [setting.info(number) for number in range(num)]
        views = [router.views for router in self._routers]
        self._control = SimControl(infos, views) if setting.controller else None
        self._run = ClusterRun(
            list(times.values()), [-1] * len(requests), [0] * len(requests), [0] * len(requests), []
        )

    def run(self) -> ClusterRun:
        """Until every request has ended. Raises SimulationError if one never does."""
        begun = thread_time()
        setting, num = self._setting, len(self._replicas)
        for number in range(num):
            for router in self._routers:
                router.views[number].heard(self._report(number, 0.0), router.name, 0.0)
            self._push(setting.report_s * (number + 1) / num, "report", (number,))
        self._start_control()
        for index, request in enumerate(self._requests):
            self._push(request.arrival_s, "arrival", (index,))
        handlers = {
            "arrival": self._arrive,
            "submit": self._submit,
            "step": self._step,
            "report": self._send_report,
            "heard": self._hear,
            "tick": self._tick,
            "ask": self._ask,
        }
        now, last = 0.0, self._requests[-1].arrival_s
        while self._left:
            now, _, kind, what = heapq.heappop(self._events)
            if now > last + 3600.0:
                raise SimulationError(f"{self._left} requests have not ended an hour after the last came")
            handlers[kind](now, *what)  # type: ignore[operator]
        self._run.reports = [core.report(now) for core in self._cores]
        self._run.cpu_s = thread_time() - begun
        return self._run

    def _push(self, at: float, kind: str, what: tuple[int, ...] | tuple[int, WorkerReport]) -> None:
        heapq.heappush(self._events, (at, next(self._order), kind, what))

    def _arrive(self, now: float, index: int) -> None:
        request, router_number = self._requests[index], self._router_of[index]
        ids = request.hash_ids
        session = f"{ids[min(_SESSION_PLACE, len(ids) - 1)]}" if ids else None
        routed = RoutedRequest(request.prompt_ids(index), session_id=session)
        begun = thread_time()
        number, seq, reason, guessed = self._routers[router_number].route(routed, now)
        self._run.decisions_s += thread_time() - begun
        self._run.chosen[index] = number
        self._run.guessed_tokens[index] = guessed
        self._run.reasons[reason] = self._run.reasons.get(reason, 0) + 1
        self._push(now + self._setting.hop_s, "submit", (number, router_number, seq, index))

    def _submit(self, now: float, number: int, router_number: int, seq: int, index: int) -> None:
        replica, seen = self._replicas[number], self._seen[number]
        name = self._routers[router_number].name
        seen[name] = max(seq, seen.get(name, 0))
        replica.submit(index, now)
        self._plan(number, now)

    def _step(self, now: float, number: int) -> None:
        replica = self._replicas[number]
        for output in replica.finish(now):
            index = int(output.request_id)
            if output.output_index == 0:
                self._run.cached_tokens[index] = output.num_cached_tokens
            if output.finish_reason is not None:
                self._left -= 1
                self._routers[self._router_of[index]].ended(output.output_index + 1)
        if replica.runs:
            self._push(replica.ends_at, "step", (number,))
            replica.plan(now)
        else:
            self._plan(number, now)

    def _plan(self, number: int, now: float) -> None:
        """Plan; if a step starts by that, its end is to come."""
        replica = self._replicas[number]
        ran = replica.runs
        replica.plan(now)
        if replica.runs and not ran:
            self._push(replica.ends_at, "step", (number,))

    def _report(self, number: int, now: float) -> WorkerReport:
        report = self._cores[number].report(now)
        return replace(report, last_submit_seq=tuple(self._seen[number].items()))

    def _send_report(self, now: float, number: int) -> None:
        report = self._report(number, now)
        self._run.digest_bytes += len(report.prefix_digest)
        self._run.num_reports += 1
        self._push(now + self._setting.report_delay_s, "heard", (number, report))
        self._push(now + self._setting.report_s, "report", (number,))

    def _hear(self, now: float, number: int, report: WorkerReport) -> None:
        for router in self._routers:
            router.views[number].heard(report, router.name, now)
        if self._control is not None:
            self._control.hear(number, report)

    def _start_control(self) -> None:
        control, num = self._control, len(self._routers)
        if control is None:
            return
        for number in range(len(self._replicas)):
            control.hear(number, self._report(number, 0.0))
        self._push(0.0, "tick", ())
        for router in range(num):
            self._push(control.ask_s * (router + 1) / num, "ask", (router,))

    def _tick(self, now: float) -> None:
        assert self._control is not None
        self._control.tick(now)
        self._push(now + self._control.tick_s, "tick", ())

    def _ask(self, now: float, router: int) -> None:
        assert self._control is not None
        self._control.ask(router, now)
        self._push(now + self._control.ask_s, "ask", (router,))
