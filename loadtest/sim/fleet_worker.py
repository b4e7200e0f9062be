"""One incarnation of a simulated worker, from when it is asked for until nobody pays for it any more."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from ellm.loadtest.sim.fleet_setting import FleetSetting
from ellm.loadtest.sim.replica import Replica
from ellm.loadtest.sim.workload import SimRequest
from ellm.worker.api.report import WorkerInfo, WorkerReport
from ellm.worker.engine.core import EngineCore

Phase = Literal["starting", "ready", "draining", "dead", "gone"]


@dataclass(slots=True)
class Engine:
    """What a worker has once it serves."""

    core: EngineCore
    replica: Replica


@dataclass(slots=True)
class FleetWorker:
    number: int
    info: WorkerInfo
    asked_at: float
    phase: Phase = "starting"
    counted: bool = True  # among those that Serve thinks there are
    ready_at: float | None = None
    ended_at: float | None = None  # its device is free again
    silent: bool = False  # dead, and no connection has broken
    engine: Engine | None = None
    routed: set[int] = field(default_factory=set)  # requests whose routers think they live here
    live: set[int] = field(default_factory=set)  # requests that its engine has
    seen: dict[str, int] = field(default_factory=dict)  # newest submission of each router

    @property
    def serves(self) -> bool:
        """It has an engine that runs."""
        return self.phase in ("ready", "draining")

    def start(self, setting: FleetSetting, requests: list[SimRequest], now: float) -> None:
        core = setting.core()
        replica = Replica(
            core,
            setting.executor(requests),
            requests,
            tpot_slo_s=setting.tpot_slo_s,
            ttft_slo_s=setting.ttft_slo_s,
        )
        replica.watches, replica.clock = False, _no_clock
        self.engine, self.phase, self.ready_at = Engine(core, replica), "ready", now

    def report(self, now: float) -> WorkerReport:
        assert self.engine is not None
        report = self.engine.core.report(now)
        state: Literal["ready", "draining"] = "draining" if self.phase == "draining" else "ready"
        return replace(report, state=state, last_submit_seq=tuple(self.seen.items()))

    def paid_s(self, now: float) -> float:
        return (now if self.ended_at is None else self.ended_at) - self.asked_at


def _no_clock() -> float:
    """Millions of steps: what each costs this machine is not asked."""
    return 0.0
