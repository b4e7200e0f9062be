"""What the router says of itself and its workers: alive, ready, and the table behind `ellm status`.

Ready means that a worker takes requests and makes progress; it does not mean that a process exists.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ellm.router.dispatch import Dispatcher
from ellm.router.failover import Hearing
from ellm.router.link import STALL_S, WorkerLink


@dataclass(frozen=True, slots=True)
class Health:
    ok: bool
    status: str
    reason: str


def alive(dispatcher: Dispatcher) -> Health:
    """False when there were workers, and all of them are gone or make no progress."""
    states = {state(link) for link in dispatcher.links.values()}
    if states & {"ready", "loading", "draining", "suspect"}:
        return Health(True, "ok", "")
    if not states and not dispatcher.num_lost:
        return Health(True, "ok", "no worker has come up yet")
    return Health(False, "failed", "no worker is alive")


def ready(dispatcher: Dispatcher) -> Health:
    """True when at least one worker takes requests."""
    states = sorted(state(link) for link in dispatcher.links.values())
    if "ready" in states or "suspect" in states:
        return Health(True, "ready", "")
    return Health(False, "unavailable", f"workers: {', '.join(states) or 'none'}")


def state(link: WorkerLink) -> str:
    """The worker's own word, unless it is silent or makes no progress."""
    report = link.report
    if link.lost or link.watch.hearing is Hearing.SILENT:
        return "lost"
    if report is None:
        return "loading"
    if report.state == "ready":
        if report.since_last_step_s >= STALL_S:
            return "stalled"
        if link.watch.hearing is Hearing.SUSPECT:
            return "suspect"
    return report.state


def workers(dispatcher: Dispatcher) -> list[dict[str, Any]]:
    """One entry per worker that the router has a line to, sorted by id."""
    links = sorted(dispatcher.links.values(), key=lambda link: link.info.worker_id)
    return [_entry(link) for link in links]


def _entry(link: WorkerLink) -> dict[str, Any]:
    info = asdict(link.info)
    report = {} if link.report is None else asdict(link.report)
    for name in ("seq", "last_submit_seq", "state", "prefix_digest"):
        report.pop(name, None)
    return {
        "id": info.pop("worker_id"),
        "node": info.pop("node"),
        "state": state(link),
        "rank_pids": info.pop("rank_pids"),
        **report,
        **info,
        "memory": dict(info["memory"]),
        "start_s": {phase: round(seconds, 3) for phase, seconds in info["start_s"]},
        "num_here": len(link.live),  # sequences of this router
        "weight": link.replica.weight,  # as the controller advises
        "silence_s": round(link.watch.silence_s, 3),
    }
