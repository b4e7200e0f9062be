"""`slsqp`: batch size b and uncached ratio r by a numeric solver in every step, as the paper words it.

    maximise b / T(b, r)   such that   T(b, r) <= SLO   and   b s (1 - r) <= N

with requests of s tokens each in the mean, N tokens of KV memory, and T the engine's cost model, for whole
numbers and those between. (The paper's T, FLOPs over peak, makes b / T the same at every b; and a request
that runs has a row in every step, so nothing waits.) Sequential least squares starts from the last solution
and finds a local best. Holes are `literal`'s: they grow, and shrink only as a share of what gets longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from time import perf_counter
from typing import Any

from ellm.worker.api.cost_model import CostModel
from ellm.worker.api.errors import ConfigError
from ellm.worker.engine.policies.literal import Literal
from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState

_MOST = 0.95  # of a request may be uncached
_STEPS = 30  # of the solver


@dataclass(frozen=True, slots=True)
class Problem:
    """One step's: everything in tokens, rows and seconds."""

    mean_tokens: float  # s
    capacity_tokens: int  # N
    most_requests: int  # that there are, or that may run
    max_rows: int  # of a step
    limit_s: float | None
    coefficients: dict[str, float]  # of the cost model

    def step_s(self, count: float, ratio: float) -> float:
        """T, with the recomputed rows of all requests in the batch."""
        c, holes = self.coefficients, count * ratio * self.mean_tokens
        rows = count + holes
        seconds = c["overhead_s"] + rows * c["row_s"]
        seconds += count * (c["decode_row_s"] + c["logits_row_s"])
        seconds += (count * self.mean_tokens + holes) * c["kv_token_s"]
        seconds += 0.5 * holes * ratio * self.mean_tokens * c["pair_s"]
        for name, slope in c.items():
            if name.startswith("row_above_") and slope:
                seconds += slope * max(0.0, rows - int(name.split("_")[2]))
        return max(seconds, 1e-9)

    def feasible(self, count: float, ratio: float, slack: float = 1e-6) -> bool:
        """Whether every constraint holds, to within `slack` of its size."""
        return all(room >= -slack for room in self.rooms(count, ratio))

    def rooms(self, count: float, ratio: float) -> list[float]:
        """What is left of memory, rows and time, as shares; negative: too much."""
        used = count * self.mean_tokens * (1.0 - ratio)
        rooms = [
            1.0 - used / self.capacity_tokens,
            1.0 - count * (1.0 + ratio * self.mean_tokens) / self.max_rows,
        ]
        if self.limit_s is not None:
            rooms.append(1.0 - self.step_s(count, ratio) / self.limit_s)
        return rooms


def solve(problem: Problem, count: float, ratio: float) -> tuple[float, float] | None:
    """(b, r) from the given start; None where the solver finds nothing that is feasible. Needs scipy."""
    from scipy.optimize import minimize

    most = float(problem.most_requests)
    scale = problem.step_s(1.0, 0.0)  # so that the objective is near 1

    def objective(x: Any) -> float:
        return -sqrt(scale * most * x[0] / problem.step_s(most * x[0], x[1]) / most)

    found = minimize(
        objective,
        (min(1.0, max(1.0, count) / most), min(_MOST, max(0.0, ratio))),
        method="SLSQP",
        bounds=((min(1.0, 1.0 / most), 1.0), (0.0, _MOST)),
        constraints={"type": "ineq", "fun": lambda x: problem.rooms(most * x[0], x[1])},
        options={"maxiter": _STEPS, "ftol": 1e-7},
    )
    best = most * float(found.x[0]), float(found.x[1])
    return best if problem.feasible(*best, slack=1e-3) else None


class Slsqp(Literal):
    """Optimistic beyond b and r; what the solver took is in `figures`."""

    def __init__(self) -> None:
        """Raises ConfigError without scipy."""
        try:
            import scipy.optimize  # noqa: F401
        except ImportError as error:
            raise ConfigError("policy slsqp needs scipy: pip install 'ellm-on-ray[slsqp]'") from error
        super().__init__(0.0)
        self._count = 1.0
        self._num_solves = self._num_failed = 0
        self._solving_s = self._worst_s = 0.0

    def prepare(self, now: float) -> None:
        state = self.state
        if state.running or len(state.waiting):
            self._solve()
        super().prepare(now)

    def may_admit(self, state: EngineState, seq: Sequence, num_blocks: int, now: float) -> bool:
        if state.running and len(state.running) + 1 > self._count:
            return False
        return super().may_admit(state, seq, num_blocks, now)

    def figures(self) -> dict[str, float]:
        """For the result file: milliseconds of this machine, per step."""
        count = max(1, self._num_solves)
        return {
            "solver_mean_ms": 1e3 * self._solving_s / count,
            "solver_worst_ms": 1e3 * self._worst_s,
            "solver_failed_share": self._num_failed / count,
        }

    def _solve(self) -> None:
        started = perf_counter()
        found = solve(self._problem(self.state, self.cost_model), self._count, self._ratio)
        taken = perf_counter() - started
        self._num_solves += 1
        self._solving_s += taken
        self._worst_s = max(self._worst_s, taken)
        if found is None:
            self._num_failed += 1
        else:
            self._count, self._ratio = found

    def _problem(self, state: EngineState, cost_model: CostModel) -> Problem:
        front = state.waiting.peek()
        known = [*state.running, *([front] if front is not None else [])]
        slos = [seq.tpot_slo_s for seq in known if seq.tpot_slo_s is not None]
        return Problem(
            sum(len(seq.tokens) for seq in known) / max(1, len(known)),
            state.pool.num_blocks * state.block_size,
            max(1, min(state.max_num_seqs, len(state.running) + len(state.waiting))),
            state.config.max_step_tokens,
            min(slos, default=None),
            cost_model.coefficients,
        )
