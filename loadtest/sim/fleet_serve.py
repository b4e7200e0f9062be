"""What Ray Serve does for a simulated fleet: workers start, are drained and replaced; and what kills them.

It is told how many there should be and decides nothing else. Requests are its owner's.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Protocol

from ellm.loadtest.sim.fleet_run import Events, FleetRun
from ellm.loadtest.sim.fleet_setting import FleetSetting
from ellm.loadtest.sim.fleet_worker import FleetWorker
from ellm.loadtest.sim.workload import SimRequest
from ellm.worker.api.output import SequenceOutput


class Owner(Protocol):
    """Routers and the controller, as they are seen from here."""

    def came_up(self, now: float, worker: FleetWorker) -> None: ...

    def take(self, worker: FleetWorker, outputs: Sequence[SequenceOutput], now: float) -> None:
        """What an engine gives back."""
        ...

    def drains(self, now: float, worker: FleetWorker) -> None:
        """It says so in a report."""
        ...

    def suspect(self, now: float, worker: FleetWorker) -> None: ...

    def lose(self, now: float, worker: FleetWorker, reason: str) -> None:
        """Routers have noticed that it is gone."""
        ...

    def forget(self, now: float, worker: FleetWorker) -> None:
        """The directory names it no more."""
        ...


class FleetServe:
    def __init__(
        self,
        setting: FleetSetting,
        requests: list[SimRequest],
        seed: int,
        *,
        events: Events,
        run: FleetRun,
        owner: Owner,
    ) -> None:
        self.target = setting.min_workers
        self.workers = run.workers
        self._setting = setting
        self._requests = requests
        self._events = events
        self._run = run
        self._owner = owner
        self._chance = Random(f"starts {seed}")
        self._fate = Random(f"deaths {seed}")

    def begin(self) -> None:
        """Those that were there before the day began; and when some will die: at the same times for every
        fleet of a seed, whoever it then hits."""
        for _ in range(self.target):
            self._come_up(0.0, self._ask_for_one(0.0))
        for number in range(self._setting.deaths.count):
            when = self._setting.duration_s * self._fate.uniform(0.02, 0.98)
            self._events.at(when, self._die, self._fate.random(), number % 2 == 1)

    def scale(self, target: int, now: float) -> None:
        """As many as are wanted from now on. Those that still start go first, then the newest."""
        self.target = target
        there = [worker for worker in self.workers if worker.counted]
        start_up = self._setting.start_up
        for _ in range(target - len(there)):
            phases = start_up.phases(self._setting.device.model.weight_bytes)
            spread = self._chance.uniform(1.0 - start_up.jitter, 1.0 + start_up.jitter)
            self._events.at(now + spread * sum(phases.values()), self._come_up, self._ask_for_one(now))
        there.sort(key=lambda worker: (worker.phase == "starting", worker.number), reverse=True)
        for worker in there[: max(0, len(there) - target)]:
            self._let_go(worker, now)

    def _ask_for_one(self, now: float) -> FleetWorker:
        worker = FleetWorker(len(self.workers), self._setting.info(len(self.workers)), now)
        self.workers.append(worker)
        return worker

    def _come_up(self, now: float, worker: FleetWorker) -> None:
        if worker.phase == "starting":
            worker.start(self._setting, self._requests, now)
            self._owner.came_up(now, worker)

    def _let_go(self, worker: FleetWorker, now: float) -> None:
        """Take a worker out: what waits there is handed back at once, what runs may end."""
        worker.counted = False
        if worker.phase == "starting":
            worker.phase, worker.ended_at = "gone", now
        if worker.phase != "ready":
            return
        assert worker.engine is not None
        worker.phase = "draining"
        self._owner.take(worker, worker.engine.core.hand_back(now, everybody=False), now)
        self._events.at(now, self._owner.drains, worker)
        self._events.at(now + self._setting.drain_timeout_s, self._cut, worker)
        self.leave_if_empty(worker, now)

    def _cut(self, now: float, worker: FleetWorker) -> None:
        """Time is up: what still runs is handed back, too."""
        if worker.phase == "draining":
            assert worker.engine is not None
            self._owner.take(worker, worker.engine.core.hand_back(now, everybody=True), now)
            self.leave_if_empty(worker, now)

    def leave_if_empty(self, worker: FleetWorker, now: float) -> None:
        """A draining worker goes with its last request."""
        if worker.phase == "draining" and not worker.live:
            worker.phase, worker.ended_at, worker.engine = "gone", now, None
            self._events.at(now + self._setting.hop_s, self._owner.lose, worker, "drain")

    def _die(self, now: float, lot: float, silent: bool) -> None:
        ready = [worker for worker in self.workers if worker.phase == "ready"]
        if not ready:
            return
        worker, setting, events = ready[int(lot * len(ready))], self._setting, self._events
        worker.phase, worker.silent, worker.engine = "dead", silent, None
        worker.live.clear()
        self._run.deaths.append((now, "silent" if silent else "crash"))
        heard_s, noticed_s = setting.hop_s, setting.deaths.crash_noticed_s
        if silent:
            heard_s, noticed_s = setting.failover.fail_s, setting.deaths.silent_noticed_s
            events.at(now + setting.failover.suspect_s, self._owner.suspect, worker)
        events.at(now + heard_s, self._owner.lose, worker, "death")
        events.at(now + noticed_s, self._notice, worker)

    def _notice(self, now: float, worker: FleetWorker) -> None:
        """Serve knows of the death: the device is free, and another worker is started."""
        worker.ended_at, worker.counted = now, False
        self._owner.forget(now, worker)
        self.scale(self.target, now)
