"""A fleet in simulated time, over a day: the real engine cores, controller and routing policies; workers that
are asked for, start, die, and are drained; requests that go on elsewhere with the tokens that they have.

What is simulated is what Ray Serve and the network do: a worker that is wanted starts, one too many is
drained, one that died is replaced once that is noticed. Which tokens came is checked as a router does: the
index of each must be the number of those before it. A request is lost if it ends in any other way than with
its last token, once.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from random import Random
from time import thread_time

from ellm.loadtest.sim.fleet_control import FleetControl
from ellm.loadtest.sim.fleet_routers import FleetRouter
from ellm.loadtest.sim.fleet_run import Events, FleetRun, Sample
from ellm.loadtest.sim.fleet_serve import FleetServe
from ellm.loadtest.sim.fleet_setting import FleetSetting
from ellm.loadtest.sim.fleet_worker import FleetWorker
from ellm.loadtest.sim.replica import SimulationError
from ellm.loadtest.sim.workload import SimRequest
from ellm.router.guidance import PERIOD_S
from ellm.router.policies import make_policy
from ellm.router.rescue import MAX_MOVES, MOVE_PAUSE_S
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.report import WorkerReport

REFRESH_S = 1.0  # a directory is read so often
SAMPLE_S = 10.0
PATIENCE_S = 3600.0  # after the last arrival: who has not ended by then never will


class Fleet:
    """One run."""

    def __init__(self, setting: FleetSetting, requests: list[SimRequest], seed: int = 0) -> None:
        setting.check()
        self._setting = setting
        self._requests = requests
        num = len(requests)
        zeros = bytes(8 * num)
        self._run = FleetRun(array("d", zeros), array("d", zeros), array("q", zeros), array("q", zeros))
        self._routers = [
            FleetRouter(f"r{i}", make_policy(setting.routing, 100 * seed + i))
            for i in range(setting.num_routers)
        ]
        drawn = Random(f"routers {seed}")
        self._router_of = [drawn.randrange(setting.num_routers) for _ in range(num)]
        self._attempts = [0] * num
        self._moves: dict[int, tuple[int, int]] = {}  # request -> (moves, deaths)
        self._control = FleetControl(setting.controller, setting.scale, self._routers)
        self._events = Events()
        self._at = self._events.at
        self._serve = FleetServe(setting, requests, seed, events=self._events, run=self._run, owner=self)
        self._workers = self._run.workers
        self._left = num

    def run(self) -> FleetRun:
        """Until every request has ended and the day is over. Raises SimulationError if one never does."""
        begun, setting, run = thread_time(), self._setting, self._run
        self._serve.begin()
        for number in range(len(self._routers)):
            self._at(PERIOD_S * (number + 1) / len(self._routers), self._ask, number)
        self._at(0.0, self._tick)
        self._at(0.0, self._sample)
        if self._requests:
            self._at(self._requests[0].arrival_s, self._arrive, 0)
        last = max(setting.duration_s, self._requests[-1].arrival_s if self._requests else 0.0)
        now = 0.0
        while self._left or now < setting.duration_s:
            now, handler, what = self._events.pop()
            if now > last + PATIENCE_S:
                raise SimulationError(f"{self._left} requests have not ended an hour after the last came")
            handler(now, *what)
        for worker in self._workers:
            if worker.serves and worker.engine is not None:
                worker.engine.core.check()
        run.end_s, run.cpu_s = now, thread_time() - begun
        return run

    # Requests

    def _arrive(self, now: float, index: int) -> None:
        if index + 1 < len(self._requests):
            self._at(self._requests[index + 1].arrival_s, self._arrive, index + 1)
        self._place(now, index)

    def _place(self, now: float, index: int) -> None:
        number = self._router_of[index]
        router, prompt = self._routers[number], self._requests[index].prompt_ids(index)
        routed = router.route(prompt, self._run.emitted[index], now)
        if routed is None:
            taken = index in self._moves
            wait_s = self._setting.failover.hold_s if taken else self._setting.queue_timeout_s
            router.gate[index] = now
            self._at(now + wait_s, self._give_up, index, self._attempts[index])
            return
        worker = self._workers[routed[0]]
        worker.routed.add(index)
        self._at(
            now + self._setting.hop_s, self._submit, worker, number, routed[1], index, self._attempts[index]
        )

    def _give_up(self, now: float, index: int, attempt: int) -> None:
        gate = self._routers[self._router_of[index]].gate
        if index in gate and self._attempts[index] == attempt:
            del gate[index]
            self._fail(index, "no worker is up")

    def _submit(
        self, now: float, worker: FleetWorker, router: int, seq: int, index: int, attempt: int
    ) -> None:
        if worker.phase == "dead" or attempt != self._attempts[index]:
            return  # nobody hears it; its router moves it when it notices
        if worker.phase != "ready":
            self._at(now + self._setting.hop_s, self._move, worker, index, attempt, "drain")
            return
        assert worker.engine is not None
        name = self._routers[router].name
        worker.seen[name] = max(seq, worker.seen.get(name, 0))
        worker.live.add(index)
        worker.engine.replica.submit(index, now, attempt=attempt, emitted=self._run.emitted[index])
        self._plan(worker, now)

    def _move(self, now: float, worker: FleetWorker, index: int, attempt: int, reason: str) -> None:
        """A request goes on elsewhere, as router/rescue.py has it."""
        worker.routed.discard(index)
        if attempt != self._attempts[index]:
            return
        self._attempts[index] += 1
        moves, deaths = self._moves.get(index, (0, 0))
        self._moves[index] = moves, deaths = moves + 1, deaths + (reason == "death")
        self._run.moved[reason] += 1
        if deaths > self._setting.failover.max_failovers:
            self._fail(index, "its workers died")
        elif moves > MAX_MOVES:
            self._fail(index, "no worker keeps it")
        else:
            self._at(now + MOVE_PAUSE_S * (moves - 1), self._place, index)

    def _fail(self, index: int, why: str) -> None:
        assert index not in self._run.failed
        self._run.failed[index] = why
        self._left -= 1

    # Steps

    def _plan(self, worker: FleetWorker, now: float) -> None:
        """Plan; if a step starts by that, its end is to come."""
        assert worker.engine is not None
        replica = worker.engine.replica
        ran = replica.runs
        replica.plan(now)
        if replica.runs and not ran:
            self._at(replica.ends_at, self._step, worker)

    def _step(self, now: float, worker: FleetWorker) -> None:
        if not worker.serves:
            return  # it died, or went, while the step ran
        assert worker.engine is not None
        replica = worker.engine.replica
        self.take(worker, replica.finish(now), now)
        if replica.runs:
            self._at(replica.ends_at, self._step, worker)
            replica.plan(now)
        else:
            self._plan(worker, now)
        self._serve.leave_if_empty(worker, now)

    def take(self, worker: FleetWorker, outputs: Sequence[SequenceOutput], now: float) -> None:
        run, attempts = self._run, self._attempts
        for output in outputs:
            index = int(output.request_id)
            if output.error is not None:
                worker.live.discard(index)
                self._at(now + self._setting.hop_s, self._move, worker, index, output.attempt, "drain")
                continue
            emitted = run.emitted[index]
            if output.attempt != attempts[index] or output.output_index != emitted or run.num_ends[index]:
                raise SimulationError(f"request {index}: token {output.output_index} came after {emitted}")
            if emitted == 0:
                run.first_s[index] = now
            run.emitted[index] = emitted + len(output.token_ids)
            if output.finish_reason is not None:
                self._end(worker, index, now)

    def _end(self, worker: FleetWorker, index: int, now: float) -> None:
        run = self._run
        run.last_s[index] = now
        run.num_ends[index] += 1
        worker.live.discard(index)
        worker.routed.discard(index)
        self._left -= 1
        self._routers[self._router_of[index]].ended(run.emitted[index])

    # Workers, as routers and the controller know them

    def came_up(self, now: float, worker: FleetWorker) -> None:
        for number in range(len(self._routers)):  # each finds it when it next reads its directory
            wait_s = 0.0 if now == 0.0 else REFRESH_S * (number + 1) / len(self._routers)
            self._at(now + wait_s, self._find, worker, number)
        phase = (worker.number * 0.37) % 1.0  # reports of different workers do not come together
        self._at(now + self._setting.report_s * phase, self._report, worker)

    def _find(self, now: float, worker: FleetWorker, number: int) -> None:
        if worker.serves:
            self._heard_by(number, worker, worker.report(now), now)

    def lose(self, now: float, worker: FleetWorker, reason: str) -> None:
        """Routers have noticed that it is gone."""
        for router in self._routers:
            router.forget(worker.number)
        if not worker.silent:
            self._at(now + REFRESH_S, self.forget, worker)
        for index in sorted(worker.routed):
            self._move(now, worker, index, self._attempts[index], reason)

    def forget(self, now: float, worker: FleetWorker) -> None:
        self._control.forget(worker.number)

    def suspect(self, now: float, worker: FleetWorker) -> None:
        for router in self._routers:
            router.suspects.add(worker.number)

    # Reports and advice

    def _report(self, now: float, worker: FleetWorker) -> None:
        if worker.serves:
            self._report_now(now, worker)
            self._at(now + self._setting.report_s, self._report, worker)

    def drains(self, now: float, worker: FleetWorker) -> None:
        self._report_now(now, worker)

    def _report_now(self, now: float, worker: FleetWorker) -> None:
        if worker.serves:
            report = worker.report(now)
            for number, router in enumerate(self._routers):
                if worker.number in router.views:
                    self._heard_by(number, worker, report, now)
            self._control.heard(worker.number, worker.info, report)

    def _heard_by(self, number: int, worker: FleetWorker, report: WorkerReport, now: float) -> None:
        router = self._routers[number]
        router.heard(worker.number, report, now)
        if router.gate and report.state == "ready":
            waiting, router.gate = list(router.gate), {}
            for index in waiting:
                self._place(now, index)

    def _tick(self, now: float) -> None:
        scale = self._control.tick(now)
        if scale is not None:
            self._run.scalings.append((now, scale.num_workers, scale.reason))
            self._serve.scale(scale.num_workers, now)
        self._at(now + self._setting.controller.tick_s, self._tick)

    def _ask(self, now: float, router: int) -> None:
        self._control.ask(router, now)
        self._at(now + PERIOD_S, self._ask, router)

    def _sample(self, now: float) -> None:
        phases = Counter(worker.phase for worker in self._workers)
        held = sum(len(worker.live) for worker in self._workers)
        self._run.samples.append(
            Sample(now, self._serve.target, phases["ready"], phases["starting"], phases["draining"], held)
        )
        self._at(now + SAMPLE_S, self._sample)
