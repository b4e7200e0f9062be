"""`full-offload`: `full-chunked` with a host tier behind it, as servers with a KV connector have it.

Full blocks are written through to the host while the link is idle, those of the last to arrive first, for
they are preempted first. A preempted request goes back to the queue; when its turn comes, what the host has
is loaded beside the steps, and the rest is computed.
"""

from __future__ import annotations

from ellm.worker.api.cost_model import CostModel
from ellm.worker.engine.plan import BatchPlan, StepResult
from ellm.worker.engine.policies.base import Policy
from ellm.worker.engine.policies.host_traffic import HostTraffic
from ellm.worker.engine.residency import Residency
from ellm.worker.engine.state import EngineState

_ROWS = 64  # of a step, for the front of those that are being loaded: the link does the rest
_SMOOTHING = 0.05


class FullOffload(Policy):
    """Knows nothing of time to come, lengths or SLOs."""

    parks = True  # in the sense that counts here: a request's blocks are found again by their names

    def __init__(self) -> None:
        self._step_s = 0.0

    def attach(self, state: EngineState, residency: Residency, cost_model: CostModel) -> None:
        super().attach(state, residency, cost_model)
        self.traffic = HostTraffic(state, residency)

    def prepare(self, now: float) -> None:
        if self.state.host is not None:
            self.traffic.load(self._step_s)
            self.traffic.save(self.state.running[::-1], self._step_s)

    def restore_rows(self, state: EngineState, num_decode: int, now: float) -> int:
        return _ROWS if state.host is not None else state.config.max_step_tokens

    def stepped(self, plan: BatchPlan, result: StepResult, now: float) -> None:
        self.traffic.observe(result.copy_times)
        if plan.entries:
            self._step_s += _SMOOTHING * (result.elapsed_s - self._step_s)
