"""What a policy that looks ahead learns from its engine: output lengths, what prompts cost, who was on time.

It learns from tokens and ends as they come and decides nothing.
"""

from __future__ import annotations

from bisect import bisect_left

from ellm.worker.api.cost_model import CostModel
from ellm.worker.engine.planner.attainment import SafetyFactor
from ellm.worker.engine.planner.lengths import BIN, OutputLengths
from ellm.worker.engine.planner.step_cost import StepCost
from ellm.worker.engine.sequence import Sequence

_UNLIMITED = 1 << 20  # tokens


class Forecast:
    """One per policy; its owner passes `emitted` and `finished` on."""

    def __init__(self, cost_model: CostModel) -> None:
        self.cost_model = cost_model
        self.lengths = OutputLengths()
        self.step_cost = StepCost(cost_model)
        self.safety = SafetyFactor()
        size = len(self.lengths.horizons)
        self._certain = [(1.0,) * n + (0.0,) * (size - n) for n in range(size + 1)]

    def emitted(self, seq: Sequence) -> None:
        """`seq` has a new token. A bin of lengths is passed when the first token behind it comes."""
        num_output = len(seq.tokens) - seq.num_prompt
        if num_output % BIN == 1 and num_output > 1 and seq.stop_ids:
            self.lengths.passed(num_output // BIN - 1)

    def finished(self, seq: Sequence, judged: bool = True) -> None:
        """`seq` has ended by itself. The length of one that nothing but max_tokens could stop says
        nothing. `judged`: whether it was late speaks of `safety`."""
        num_output = len(seq.tokens) - seq.num_prompt
        if seq.stop_ids:
            censored = seq.tokens[-1] not in seq.stop_ids
            self.lengths.finished(num_output, censored=censored, num_passed=(num_output - 1) // BIN)
        self.step_cost.finished(seq.num_prompt, seq.num_cached_tokens or 0, num_output)
        if judged and self.could_be_kept(seq):
            self.safety.finished(not seq.late)  # one that nobody could keep says nothing of admission

    def could_be_kept(self, seq: Sequence) -> bool:
        """Its SLO, by whoever has the engine to itself."""
        return seq.tpot_slo_s is not None and self.step_cost(1, 0) <= seq.tpot_slo_s

    def aborted(self, seq: Sequence) -> None:
        """`seq` was ended from outside. For its memory that is an end like any other."""
        num_output = len(seq.tokens) - seq.num_prompt
        if seq.stop_ids and num_output > 0:
            self.lengths.finished(num_output, censored=False, num_passed=(num_output - 1) // BIN)

    def survival(self, seq: Sequence) -> tuple[float, ...]:
        """Chances that `seq` is still there at each horizon, as `OutputLengths.conditional`; certain up to
        max_tokens where nothing stops it."""
        num_output, max_tokens = len(seq.tokens) - seq.num_prompt, seq.max_total - seq.num_prompt
        if seq.stop_ids:
            return self.lengths.conditional(num_output, max_tokens)
        horizons = self.lengths.horizons
        count = bisect_left(horizons, max_tokens - num_output) + 1
        return self._certain[min(count, len(horizons))]

    @property
    def mean_output(self) -> float:
        """Tokens that a request that starts is expected to put out, where nothing limits it."""
        return self.lengths.expected_remaining(0, _UNLIMITED)

    def remaining(self, seq: Sequence) -> float:
        """Tokens that `seq` is expected to put out yet."""
        num_output, max_tokens = len(seq.tokens) - seq.num_prompt, seq.max_total - seq.num_prompt
        if seq.stop_ids:
            return self.lengths.expected_remaining(num_output, max_tokens)
        return float(max(0, max_tokens - num_output))
