"""`literal(r)`: every running request leaves its oldest share `r` uncached and recomputes it in each step.

The mechanism as the paper words it, for comparisons and for budgets so small that it pays. A request's hole
grows by whole blocks as it gets longer; with `stream`, that share of the hole, from its end, comes from the
host instead. Admission is optimistic, the last to arrive gives way, as in `full-chunked`.
"""

from __future__ import annotations

from ellm.worker.api.cost_model import CostModel
from ellm.worker.api.errors import ConfigError
from ellm.worker.engine.policies.base import Policy
from ellm.worker.engine.policies.prefix_holes import PrefixHoles
from ellm.worker.engine.residency import Residency
from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState

_SAVES = 64  # blocks that are on their way to the host at a time


class Literal(Policy):
    """Knows nothing of time, lengths to come or SLOs."""

    parks = True  # its blocks on the host are found by their names

    def __init__(self, r: float, stream: float = 0.0) -> None:
        """Raises ConfigError for shares that cannot be."""
        for name, share, below in (("r", r, 0.95), ("stream", stream, 1.0)):
            if not 0.0 <= share <= below:
                raise ConfigError(f"literal: {name} must be in [0, {below}]", param="scheduler.policy")
        self._ratio = r
        self._stream = stream

    def attach(self, state: EngineState, residency: Residency, cost_model: CostModel) -> None:
        """Raises ConfigError where the engine has nothing to make the holes of."""
        super().attach(state, residency, cost_model)
        if self._ratio and not state.transient:
            raise ConfigError(
                f"literal: r = {self._ratio:g} needs cache.transient_blocks: what is recomputed in a step is "
                "held there",
                param="cache.transient_blocks",
            )
        if self._ratio and self._stream and state.host is None:
            raise ConfigError(
                f"literal: stream = {self._stream:g} needs a host tier to copy to (cache.host_bytes; "
                "on a CPU with cache.host_tier = copied)",
                param="cache.host_bytes",
            )
        self._prefixes = PrefixHoles(state, self.holes, self._ratio, self._stream)

    def prepare(self, now: float) -> None:
        if self._stream:
            self._save()
        self._prefixes.widen_all()

    def may_admit(self, state: EngineState, seq: Sequence, num_blocks: int, now: float) -> bool:
        """As optimistic as ever, but as many rows as a step has must do for all holes."""
        if not state.running:
            return True
        return self._prefixes.have_rows(seq) and super().may_admit(state, seq, num_blocks, now)

    def _save(self) -> None:
        copies = self.state.copies
        if copies is None:
            return
        budget = _SAVES - copies.num_saves
        for seq in self.state.running:
            if budget > 0:
                budget -= self.residency.save(seq, budget)
