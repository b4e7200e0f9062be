"""The controller's brain: from what workers and routers say to advice, tenants' budgets and scaling targets.

It holds nothing that the next reports do not bring back, but the prompts that are held back, which routers
keep as well. What is said by nobody is not assumed: routers that hear nothing weigh all workers alike.
Pure: time is an argument, and may jump.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from ellm.cluster.api.actions import Action, Advise, Distrust, Resign, Scale
from ellm.cluster.api.config import ControllerConfig, ModelScale
from ellm.cluster.api.guidance import Guidance, WorkerGuidance
from ellm.cluster.api.view import RouterNote, RouterView, View
from ellm.cluster.budgets import lend
from ellm.cluster.health import Health, Track
from ellm.cluster.scaling import Scaler
from ellm.cluster.weights import admit_tokens, update_weights
from ellm.worker.api.report import WorkerReport

MAX_HELD_BACK = 1024
GUIDANCE_PERIOD_S = 1.0  # routers ask about so often


class Controller:
    """One incarnation. `term` is higher than that of every controller before it."""

    def __init__(self, config: ControllerConfig, term: int, models: Sequence[ModelScale] = ()) -> None:
        self.term = term
        self.health = Health(config)
        self.scalers = {scale.model: Scaler(scale, config.scaling) for scale in models}
        self._config = config
        self._seq = 0
        self._last: float | None = None
        self._age_s = 0.0
        self._notes: dict[str, tuple[RouterNote, int, float]] = {}  # router -> note, words heard, silence
        self._held_back: dict[bytes, float] = {}  # prompt -> for how long yet
        self._distrusted: dict[str, str] = {}  # epoch -> why

    def tick(self, view: View, now: float) -> list[Action]:
        """What to do now. Called every `tick_s`, and whenever else: it goes by the time that has passed."""
        if view.newest_term > self.term:
            return [Resign(view.newest_term)]
        elapsed_s = self._elapsed(now)
        self._age_s += elapsed_s
        self.health.update(view.workers, elapsed_s)
        self._hear(view.routers, elapsed_s)
        by_model = self._by_model()
        actions: list[Action] = [self._advise(by_model, elapsed_s)]
        actions += self._scale(by_model, elapsed_s)
        actions += self._distrust()
        return actions

    def _elapsed(self, now: float) -> float:
        """Never negative, and never more than two ticks: of the rest nobody has watched."""
        last, self._last = self._last, now
        return 0.0 if last is None else min(max(0.0, now - last), 2 * self._config.tick_s)

    def _by_model(self) -> dict[str, list[Track]]:
        ordered = sorted(self.health.tracks.values(), key=lambda t: (t.info.model, t.info.worker_id, t.born))
        return {model: list(tracks) for model, tracks in groupby(ordered, key=lambda t: t.info.model)}

    def _hear(self, routers: Sequence[RouterView], elapsed_s: float) -> None:
        notes = self._notes
        for router_id, (note, heard, silence_s) in list(notes.items()):
            if silence_s + elapsed_s >= self._config.router_gone_s:
                del notes[router_id]
            else:
                notes[router_id] = (note, heard, silence_s + elapsed_s)
        for digest, left_s in list(self._held_back.items()):
            if left_s <= elapsed_s:
                del self._held_back[digest]
            else:
                self._held_back[digest] = left_s - elapsed_s
        for router in routers:
            self._hear_one(router)

    def _hear_one(self, router: RouterView) -> None:
        note = router.note
        known = self._notes.get(note.router_id)
        if known is not None and (router.num_heard <= known[1] or note.seq < known[0].seq):
            return  # nothing new, or older than what is known
        self._notes[note.router_id] = (note, router.num_heard, 0.0)
        for digest in note.held_back:  # a router says it as long as it holds it back: no new time
            self._held_back.setdefault(digest, self._config.held_back_s)
        while len(self._held_back) > MAX_HELD_BACK:
            del self._held_back[next(iter(self._held_back))]

    def _advise(self, by_model: dict[str, list[Track]], elapsed_s: float) -> Advise:
        self._seq += 1
        workers: list[WorkerGuidance] = []
        for tracks in by_model.values():
            weights = update_weights(tracks, elapsed_s, self._config.smoothing_s)
            workers += [
                self._word(track.report, track, weights[track.info.epoch], len(tracks))
                for track in tracks
                if track.report is not None  # of others nothing is known: routers go by what they see
            ]
        # Whoever has just started has not heard every router: one that was lent too much takes from others.
        known = self._age_s >= 2 * GUIDANCE_PERIOD_S
        budgets = lend([note for note, _, _ in self._notes.values()]) if known else {}
        guidance = Guidance(
            controller_term=self.term,
            seq=self._seq,
            valid_s=self._config.valid_s,
            num_routers=max(1, len(self._notes)) if known else 0,
            workers=tuple(workers),
            held_back=tuple(self._held_back),
        )
        return Advise(guidance, budgets)

    def _word(self, report: WorkerReport, track: Track, weight: float, of: int) -> WorkerGuidance:
        if not track.serving:
            return WorkerGuidance(track.info.epoch, 0.0, 0, track.state, of)
        budget = admit_tokens(report, GUIDANCE_PERIOD_S, self._config.plan_s)
        return WorkerGuidance(track.info.epoch, round(weight, 4), budget, track.state, of)

    def _scale(self, by_model: dict[str, list[Track]], elapsed_s: float) -> list[Action]:
        actions: list[Action] = []
        for model, scaler in self.scalers.items():
            decision = scaler.tick(by_model.get(model, ()), elapsed_s)
            if decision is not None:
                actions.append(Scale(model, decision.num_workers, decision.reason))
        return actions

    def _distrust(self) -> list[Action]:
        """Each once, when it begins."""
        faults = {e: t.fault for e, t in self.health.tracks.items() if t.fault is not None}
        new = [epoch for epoch, fault in faults.items() if self._distrusted.get(epoch) != fault]
        self._distrusted = faults
        return [Distrust(self.health.tracks[e].info.worker_id, e, faults[e]) for e in new]
