"""The simulator's executor: a plan takes what a cost model says, and every token is the same one.

Beside `SimulatedExecutor`, which checks each plan as hardware would, this one only keeps time: a fraction of
a microsecond per row. It alone knows how long outputs are.
"""

from __future__ import annotations

from collections.abc import Callable

from ellm.loadtest.sim.device import EOS
from ellm.worker.api.cost_model import CostModel
from ellm.worker.engine.plan import BatchPlan, ModelLimits, NewSequence, StepResult, step_features
from ellm.worker.executor.simulated_link import LinkSpeed, SimulatedLink

TOKEN = 1  # what the model says until it ends
assert TOKEN != EOS


class TimedExecutor:
    """`output_length(new)` tokens after its prompt a sequence ends; copies run beside the steps at `link`,
    and each block that was loaded costs `load_block_s` of computing in the step in which it comes."""

    def __init__(
        self,
        limits: ModelLimits,
        cost: CostModel,
        output_length: Callable[[NewSequence], int],
        link: LinkSpeed,
        *,
        load_block_s: float = 0.0,
    ) -> None:
        self._limits = limits
        self._cost = cost
        self._output_length = output_length
        self._last_index: dict[int, int] = {}  # sequence -> output index of its end
        self._link = SimulatedLink(link, limits.block_bytes)
        self._load_block_s = load_block_s
        self._clock = 0.0  # in steps

    @property
    def limits(self) -> ModelLimits:
        return self._limits

    def execute(self, plan: BatchPlan) -> StepResult:
        """The plan's tokens and its duration, copies that it waits for included."""
        last = self._last_index
        for seq_id in plan.released:
            del last[seq_id]
        for new in plan.new:
            last[new.seq_id] = self._output_length(new) - 1
        tokens = [
            EOS if entry.output_index == last[entry.seq_id] else TOKEN
            for entry in plan.entries
            if entry.samples
        ]
        elapsed_s = self._start_copies(plan)
        if plan.entries:
            elapsed_s += self._cost.predict(step_features(plan))
        if plan.streams:  # layer by layer, beside the layers before
            elapsed_s = max(elapsed_s, self._link.seconds(len(plan.streams)))
        self._clock += elapsed_s
        saves, loads, times = self._link.ended(self._clock)
        computing_s = len(loads) * self._load_block_s
        self._clock += computing_s
        done = tuple(copy.copy_id for copy in (*saves, *loads))
        return StepResult(
            plan.step, tuple(tokens), elapsed_s + computing_s, copies_done=done, copy_times=times
        )

    def close(self) -> None:
        self._last_index.clear()

    def _start_copies(self, plan: BatchPlan) -> float:
        """Returns the seconds until the step can begin."""
        link, clock = self._link, self._clock
        if plan.saves:
            link.start(plan.saves, clock, save=True)
        if plan.loads:
            link.start(plan.loads, clock, save=False)
        if plan.waits:
            return max(0.0, link.last_end - clock)
        if plan.entries:
            return 0.0
        assert link.next_end is not None, "a plan without entries, and no copy to wait for"
        return max(0.0, link.next_end - clock)
