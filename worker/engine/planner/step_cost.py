"""What a step costs in the long run: decode rows, and the prompts that come with them.

Every request that ends makes room for one that starts, so prompts take rows in proportion to the outputs:
mean prompt / mean output for each decode row. A prompt that was partly found in the cache counts by the rest.
"""

from __future__ import annotations

from ellm.worker.api.cost_model import CostModel, StepFeatures
from ellm.worker.engine.planner.spare_rows import spare_rows

_PRIOR_OUTPUT = 16_000.0  # tokens: eight outputs of 2,000, with no prompt, before anything has ended
_FORGETTING = 0.998  # weight of the past per end


class StepCost:
    """Callable as (decode rows, KV tokens read) -> seconds, by a cost model that goes on learning."""

    def __init__(self, cost_model: CostModel) -> None:
        self._cost_model = cost_model
        self._computed = 0.0  # prompt tokens, forgetting
        self._pairs = 0.0  # (query, key) pairs of these
        self._output = _PRIOR_OUTPUT

    def finished(self, num_prompt: int, num_cached: int, num_output: int) -> None:
        """A request ended."""
        keep = _FORGETTING
        computed = num_prompt - num_cached
        self._computed = keep * self._computed + computed
        self._pairs = keep * self._pairs + 0.5 * computed * (num_prompt + num_cached)
        self._output = keep * self._output + num_output

    @property
    def prefill_per_decode(self) -> float:
        return self._computed / self._output

    def __call__(self, rows: float, kv_tokens: float) -> float:
        prefill = rows * self._computed / self._output
        pairs = rows * self._pairs / self._output
        decode = int(rows)
        features = StepFeatures(int(rows + prefill), decode, int(kv_tokens), int(pairs), decode)
        return self._cost_model.predict(features)

    def alone(self, kv_tokens: int, max_rows: int) -> tuple[float, float]:
        """Rows per second that are spare beside one decode row, and tokens per second that it puts out: of
        the device, whatever the traffic."""

        def step_s(more: int) -> float:
            return self._cost_model.predict(StepFeatures(1 + more, 1, kv_tokens, 0, 1))

        spare, alone_s = spare_rows(step_s, 0, max_rows - 1), step_s(0)
        return (spare / step_s(spare), 1.0 / alone_s) if alone_s > 0.0 else (0.0, 0.0)

    def spare_rate(self, rows: int, kv_tokens: int, max_rows: int) -> float:
        """Rows per second that steps of `rows` decode rows can take along at next to no cost, beside the
        prompts that come with them; a step takes at most `max_rows`."""

        def step_s(more: int) -> float:
            return self._cost_model.predict(StepFeatures(rows + more, rows, kv_tokens, 0, rows))

        spare = spare_rows(step_s, 0, max_rows - rows)
        return max(0.0, spare - rows * self.prefill_per_decode) / step_s(spare)
