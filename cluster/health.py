"""What is known of each worker, sorted: which report counts, who is silent, who makes no progress.

Time is added up tick by tick, and a tick counts for twice its period at most: a controller that itself stood
still, or whose clock jumped, knows nothing of the time between. A worker's id says no more than its place:
Serve gives one away again while the former owner still serves, so of two incarnations with one id the older
is dead only if nothing was heard of it since the newer one came. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ellm.cluster.api.config import ControllerConfig
from ellm.cluster.api.view import WorkerView
from ellm.worker.api.report import WorkerInfo, WorkerReport, WorkerState

MAX_GONE = 4096  # incarnations that are remembered after they left
HEARD_S = 1.0  # between two words of one that is well, at most: twice a heartbeat
FOLLOWED = "followed by a newer one"


@dataclass(slots=True)
class Track:
    """One incarnation."""

    info: WorkerInfo
    born: int  # which of the incarnations that came up it was: later ones are higher
    report: WorkerReport | None = None
    num_heard: int = -1
    silence_s: float = 0.0
    age_s: float = 0.0  # since its first report
    stuck_s: float = 0.0  # work, and no step finished, for so long
    fault: str | None = None  # why it gets nothing new although it calls itself ready
    weight: float | None = None  # smoothed; None before the first

    @property
    def state(self) -> WorkerState:
        if self.report is None:
            return "loading"
        return "failed" if self.fault is not None and self.report.state == "ready" else self.report.state

    @property
    def serving(self) -> bool:
        return self.state == "ready"


class Health:
    """All workers. `update` once per tick."""

    def __init__(self, config: ControllerConfig) -> None:
        self.tracks: dict[str, Track] = {}  # by epoch
        self._config = config
        self._num_born = 0
        self._gone: dict[str, None] = {}
        self._order: deque[str] = deque()

    def update(self, workers: Iterable[WorkerView], elapsed_s: float) -> None:
        """`elapsed_s` since the last tick, as it counts."""
        seen: set[str] = set()
        for worker in workers:
            epoch = worker.info.epoch
            if epoch in self._gone:  # a word of one that has been followed by another and has left
                continue
            track = self.tracks.get(epoch)
            if track is None:
                self._num_born += 1
                track = self.tracks[epoch] = Track(worker.info, self._num_born)
            if epoch not in seen:
                seen.add(epoch)
                track.silence_s += elapsed_s
                track.stuck_s += elapsed_s
                track.age_s += elapsed_s if track.report is not None else 0.0
            self._take(track, worker)
        newest = self._newest()
        for epoch in self.tracks.keys() - seen:
            self._leave(epoch)
        for track in self.tracks.values():
            track.fault = self._fault(track, newest)

    def _take(self, track: Track, worker: WorkerView) -> None:
        if worker.num_heard > track.num_heard:
            track.num_heard = worker.num_heard
            track.silence_s = 0.0
        report, last = worker.report, track.report
        if report is None or (last is not None and report.seq < last.seq):
            return  # older than what is known
        busy = report.num_running + report.num_waiting > 0
        if not busy or last is None or report.num_steps != last.num_steps:
            track.stuck_s = 0.0
        track.report = report

    def _newest(self) -> dict[tuple[str, str], Track]:
        """Of each place in the cluster (model, worker id), the incarnation that came up last."""
        newest: dict[tuple[str, str], Track] = {}
        for track in self.tracks.values():
            if track.report is not None:
                place = (track.info.model, track.info.worker_id)
                last = newest.setdefault(place, track)
                if last.born < track.born:
                    newest[place] = track
        return newest

    def _leave(self, epoch: str) -> None:
        if self.tracks.pop(epoch).fault != FOLLOWED:
            return  # it may be back: a line that broke
        self._gone[epoch] = None
        self._order.append(epoch)
        if len(self._order) > MAX_GONE:
            del self._gone[self._order.popleft()]

    def _fault(self, track: Track, newest: dict[tuple[str, str], Track]) -> str | None:
        report = track.report
        if report is None:
            return None
        last = newest[track.info.model, track.info.worker_id]
        if last.born > track.born and track.silence_s > max(last.age_s, HEARD_S):
            return FOLLOWED
        if track.silence_s >= self._config.silent_s:
            return "silent"
        if max(track.stuck_s, report.since_last_step_s) >= self._config.stall_s:
            return "no step finished although there is work"
        return None
