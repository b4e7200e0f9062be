"""A policy without sense: it parks, releases, resumes, saves and loads at random, so that a test meets every
order in which that can happen."""

from __future__ import annotations

from random import Random

from ellm.worker.engine.hole import Hole
from ellm.worker.engine.policies import Policy
from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState


class RandomResidency(Policy):
    """Every parked sequence is resumed sooner or later, so everything comes to its end."""

    parks = True

    def __init__(self, seed: int) -> None:
        self._rng = Random(seed)

    def prepare(self, now: float) -> None:
        for seq in list(self.state.running):
            if seq.gap is not None:
                self._fill(seq)
            elif seq.hole is not None or seq.rests or self._rng.random() < 0.1:
                self._change_hole(seq)
            elif self._rng.random() < 0.1:
                self.residency.park(seq, now)
        for seq in list(self.state.parked):
            self._treat(seq, now)
        if self._rng.random() < 0.1:
            self._flush()
        self._save()
        if not self.state.running:
            self._wake(now)

    def _save(self) -> None:
        if self.state.host is None:
            return
        for seq in (*self.state.running, *self.state.parked):
            if self._rng.random() < 0.5:
                self.residency.save(seq, self._rng.randint(0, 3))

    def _flush(self) -> None:
        """As if somebody had come, taken all the blocks there are, and gone."""
        pool = self.state.pool
        pool.release([pool.allocate() for _ in range(pool.num_available)])

    def _wake(self, now: float) -> None:
        """Somebody must run."""
        for seq in self.state.parked:
            while not self.residency.resume(seq, now):
                if seq.num_outstanding or not self.reclaim(now, spare=seq):
                    break
            else:
                return

    def _fill(self, seq: Sequence) -> None:
        """At random, and always where nobody computes it."""
        assert seq.gap is not None
        self.residency.load(seq, self._rng.randint(0, 2))

    def _change_hole(self, seq: Sequence) -> None:
        """Open a hole, make it larger, or close it, once no plan names the sequence."""
        full = seq.num_computed // self.state.block_size
        if seq.num_outstanding:
            seq.rests = seq.rests or self._rng.random() < 0.3
            return
        seq.rests = False
        if seq.hole is not None and self._rng.random() < 0.2:
            self.holes.close(seq)
            return
        if len(seq.tokens) - seq.num_computed != 1 or not full or self._rng.random() < 0.5:
            return
        if seq.num_saved and self._rng.random() < 0.5:
            full = min(full, seq.num_saved)
        first, end = sorted((self._rng.randint(0, full), self._rng.randint(0, full)))
        if seq.hole is not None:
            first, end = min(first, seq.hole.first), max(end, seq.hole.end)
        split = self._rng.randint(first, end) if end <= seq.num_saved else end
        if first < end:
            self.holes.open(seq, Hole(first, split, end))

    def _treat(self, seq: Sequence, now: float) -> None:
        releasable = self.residency.num_releasable(seq)
        if releasable and self._rng.random() < 0.4:
            self.residency.release_tail(seq, self._rng.randint(1, releasable))
        elif self._rng.random() < 0.3 or not self.state.running:
            self.residency.resume(seq, now)
            if seq.gap is not None:
                self._fill(seq)

    def restore_rows(self, state: EngineState, num_decode: int, now: float) -> int:
        return self._rng.choice([1, 5, 20, 1000])

    def reclaim(self, now: float, spare: Sequence | None = None) -> bool:
        for seq in self.state.parked:
            if seq is spare:
                continue
            count = self.residency.num_releasable(seq)
            if count and self.residency.release_tail(seq, self._rng.randint(1, count)):
                return True
        return False
