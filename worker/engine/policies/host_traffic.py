"""Keeps the link to the host busy with what is worth it: loads for those who are being restored, and copies
of full blocks of those who may be parked next, so that parking them costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List

from ellm.worker.engine.plan import CopyTimes
from ellm.worker.engine.planner.link import LinkCost
from ellm.worker.engine.planner.restore_path import RestorePath, restore_path
from ellm.worker.engine.residency import Residency
from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState

_AHEAD = 1.5  # steps' worth of copies that are under way at a time: enough to never idle, little to regret


class HostTraffic:
    """One per policy that uses a host tier; does nothing where there is none."""

    def __init__(self, state: EngineState, residency: Residency) -> None:
        self._state = state
        self._residency = residency
        self.save_cost = LinkCost(state.limits.block_bytes)
        self.load_cost = LinkCost(state.limits.block_bytes)

    def observe(self, times: CopyTimes | None) -> None:
        if times is not None:
            self.save_cost.observe(times.saved_bytes, times.saved_s)
            self.load_cost.observe(times.loaded_bytes, times.loaded_s)

    def load(self, step_s: float, restore_rows: Callable[[], int] | None = None) -> None:
        """First those that have waited longest. `restore_rows`: how many rows of a step may go to those who
        come back; with it a stretch of theirs is filled from one end alone where the other gains little."""
        copies = self._state.copies
        if copies is None:
            return
        restoring = [seq for seq in self._state.running if seq.gap is not None]
        if not restoring:
            return
        if restore_rows is not None:
            restoring = self._by_path(restoring, step_s, restore_rows)
        budget = self.load_cost.blocks_in(_AHEAD * step_s) - copies.num_loads
        for seq in sorted(restoring, key=lambda s: s.since):
            if budget <= 0:
                return
            budget -= self._residency.load(seq, budget)

    def _by_path(
        self, restoring: list[Sequence], step_s: float, restore_rows: Callable[[], int]
    ) -> list[Sequence]:
        """Those of them whose copies are worth it. Prompts have rows of their own, and take both."""
        back = [seq for seq in restoring if seq.first_token_at is not None]
        if not back or step_s <= 0.0:
            return restoring
        loaded_per_s = self._state.block_size / self.load_cost.block_s
        path = restore_path(restore_rows() / step_s, loaded_per_s)
        for seq in back:
            assert seq.gap is not None
            seq.gap.by_load = path is RestorePath.LOAD
        if path is not RestorePath.COMPUTE:
            return restoring
        return [seq for seq in restoring if seq.first_token_at is None or _is_loading(seq)]

    def save(self, candidates: List[Sequence], step_s: float) -> None:
        """Full blocks of `candidates`, who come in the order in which they would be parked. Where the host is
        full, copies of those who come last make room for those of the first half."""
        state, copies = self._state, self._state.copies
        if copies is None or state.host is None:
            return
        budget = self.save_cost.blocks_in(_AHEAD * step_s) - copies.num_saves
        keepers = [seq for seq in candidates[len(candidates) // 2 :] if seq.saved and not _needs_copy(seq)]
        for place, seq in enumerate(candidates):
            if budget <= 0:
                return
            if len(seq.saved) >= min(seq.num_committed, len(seq.table)):
                continue
            while not state.host.num_available and keepers and 2 * place < len(candidates):
                state.forget_saved(keepers.pop(), 0)
            if not state.host.num_available:
                return
            budget -= self._residency.save(seq, budget)


def _is_loading(seq: Sequence) -> bool:
    return seq.gap is not None and seq.gap.claimed < seq.gap.ready


def _needs_copy(seq: Sequence) -> bool:
    """Part of it is on the host alone, or on its way from there."""
    return seq.gap is not None or len(seq.table) < len(seq.saved)
