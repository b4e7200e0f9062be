"""How many workers a model should have. Pure.

A worker's load is the largest of three shares; 1 is full:

    memory     (context of all admitted requests, also parked ones, + prompts in the queue) / its pool's
               tokens. Context without KV counts: the headroom may look well only because much was dropped.
    sequences  (running + waiting + parked) / what the scheduler runs at most
    backlog    (queued prompt tokens / prefill rate + what must be brought back) / `backlog_s`

and a model's the mean over its serving workers, since routers spread requests over all. Above `high_load` for
`up_after_s` the target is as many as bring it to `target_load`, at most twice what there is; a loaded model
that breaks its promises gets one more. Below `low_load` for `down_after_s`, and if the others then stay under
`high_load`, one less. After a change nothing happens for `cool_down_s`; while workers that were asked for are
still to come, or one that died is replaced, more are added only where all of them would be too few. A
controller that has just started is told the target (`adopt`): those that still load are not heard, so what is
heard is no count. Nothing is decided before, and nothing is taken away until as many have served once, or
could have loaded by now (`LOAD_S`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ellm.cluster.api.config import ModelScale, ScalingConfig
from ellm.cluster.health import Track

LOAD_S = 600.0  # what loads for so long never comes
_BUSY = 0.5  # a model below this load breaks its promises for other reasons than want of workers


@dataclass(frozen=True, slots=True)
class Decision:
    num_workers: int
    reason: str


class Scaler:
    """Of one model."""

    def __init__(self, limits: ModelScale, config: ScalingConfig) -> None:
        self.limits = limits
        self.target: int | None = None  # None: nobody has said yet
        self._config = config
        self._high_s = 0.0
        self._low_s = 0.0
        self._quiet_s = 0.0  # since the start or the last change
        self._loading_s = 0.0  # since `adopt`; ends when as many have served
        if limits.min_workers == limits.max_workers:
            self.adopt(limits.min_workers)

    def adopt(self, current: int) -> int:
        """Take the number of workers that were asked for so far, unless a target is known; returns the
        target."""
        if self.target is None:
            self.target = min(self.limits.max_workers, max(self.limits.min_workers, current))
            self._quiet_s, self._loading_s = 0.0, LOAD_S
        return self.target

    def tick(self, tracks: Sequence[Track], elapsed_s: float) -> Decision | None:
        """A new target, or None. `tracks` are the model's workers, those that load or leave included."""
        config = self._config
        serving = [track for track in tracks if track.serving]
        self._quiet_s += elapsed_s
        if self.target is None:
            return None
        self._loading_s = 0.0 if len(serving) >= self.target else max(0.0, self._loading_s - elapsed_s)
        load, kept = fleet_load(serving, config), attainment(serving)
        high = load > config.high_load or (load > _BUSY and kept < config.min_attainment)
        self._high_s = self._high_s + elapsed_s if high else 0.0
        self._low_s = self._low_s + elapsed_s if load < config.low_load else 0.0
        if self._quiet_s < config.cool_down_s or not serving:
            return None
        if self._high_s >= config.up_after_s:
            wanted = self._enough(len(serving), load, self.target)
            if wanted > self.target:
                return self._decide(wanted, f"load {load:.2f}, attainment {kept:.2f}")
        if self._loading_s > 0.0:
            return None
        left = min(self.target - 1, len(serving))  # one that was asked for and never came is given up first
        if self._low_s >= config.down_after_s and left and load * len(serving) / left < config.high_load:
            return self._decide(self.target - 1, f"load {load:.2f}")
        return None

    def _enough(self, serving: int, load: float, target: int) -> int:
        """Workers for a load that `serving` of them have, those included that were asked for and are still to
        come: unless the load is too much for these, too, nothing is added until they are there."""
        wanted = math.ceil(serving * load / self._config.target_load)
        if serving >= target:
            return min(max(wanted, serving + 1), 2 * serving)
        enough = serving * load <= self._config.high_load * target
        return target if enough else min(wanted, 2 * serving)

    def _decide(self, wanted: int, reason: str) -> Decision | None:
        wanted = min(self.limits.max_workers, max(self.limits.min_workers, wanted))
        if wanted == self.target:
            return None
        self.target = wanted
        self._high_s = self._low_s = self._quiet_s = 0.0
        return Decision(wanted, reason)


def fleet_load(serving: Sequence[Track], config: ScalingConfig) -> float:
    """Mean load; 0 without workers."""
    return sum(worker_load(track, config) for track in serving) / len(serving) if serving else 0.0


def attainment(serving: Sequence[Track]) -> float:
    """Mean share of promises kept; 1 without workers."""
    kept = [track.report.slo_attainment for track in serving if track.report is not None]
    return sum(kept) / len(kept) if kept else 1.0


def worker_load(track: Track, config: ScalingConfig) -> float:
    """1: full; more: overloaded."""
    report = track.report
    if report is None:
        return 0.0
    pool = report.num_blocks * track.info.block_size
    context = report.running_tokens + report.parked_tokens + report.waiting_tokens
    memory = context / pool if pool > 0 else 0.0
    held = report.num_running + report.num_waiting + report.num_parked
    sequences = held / report.max_running if report.max_running > 0 else 0.0
    queued = report.waiting_tokens + report.prefill_tokens
    backlog_s = report.recompute_debt_s
    if report.prefill_rate_tok_s > 0.0:
        backlog_s += queued / report.prefill_rate_tok_s
    return max(memory, sequences, backlog_s / config.backlog_s)
