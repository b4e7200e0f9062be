"""How many rows of a step prompts and restores may take beside its decode rows.

Those that cost nothing, for the weights are read anyway; where somebody has little slack also all that a step
as short as a token may take has room for: who has just started has never more slack than that. Each row
counts with its attention, by its place in its own prompt. A few rows go to prompts whatever a step takes.
"""

from __future__ import annotations

from ellm.worker.api.cost_model import StepFeatures
from ellm.worker.engine.planner.admission import TIMELY
from ellm.worker.engine.planner.spare_rows import spare_rows
from ellm.worker.engine.policies.forecast import Forecast
from ellm.worker.engine.policies.sharing import tightest
from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState

# For prompts and restores whatever happens: they must get on, and where no row is spare a restore in small
# pieces costs no less and holds its memory longer.
_MIN_ROWS = 64


def free_rows(state: EngineState, forecast: Forecast, num_decode: int) -> int:
    """Rows that cost next to nothing; all, if nobody who runs has a deadline that a long step could break."""
    return _rows(state, forecast, num_decode, 0.0, _behind(state, state.config.max_step_tokens))


def timely_rows(state: EngineState, forecast: Forecast, num_decode: int) -> int:
    """As many as leave every token on time, if each step of those to come takes as many; those without which
    no prompt would get on in any case."""
    limit_s = tightest(state.running, forecast)
    behind = _behind(state, state.config.max_step_tokens)
    if any(seq.first_token_at is not None for seq, _ in behind):  # who comes back gets no more than free rows
        behind = _behind(state, _rows(state, forecast, num_decode, 0.0, behind))
    return _rows(state, forecast, num_decode, TIMELY * limit_s if limit_s is not None else 0.0, behind)


def _rows(
    state: EngineState,
    forecast: Forecast,
    num_decode: int,
    allowed_s: float,
    behind: list[tuple[Sequence, int]],
) -> int:
    most = state.config.max_step_tokens - num_decode
    if not num_decode or all(seq.tpot_slo_s is None for seq in state.running):
        return most
    tokens = sum([seq.num_planned for seq in state.running])

    def step_s(more: int) -> float:
        features = StepFeatures(num_decode + more, num_decode, tokens, _pairs(behind, more), num_decode)
        return forecast.cost_model.predict(features)

    return spare_rows(step_s, _MIN_ROWS, most, allowed_s)


def _behind(state: EngineState, restored: int) -> list[tuple[Sequence, int]]:
    """Those who run and have more to compute than a decode row, in the order in which they get rows, and how
    many each can take; those who come back, all together, at most `restored`."""
    found = []
    for seq in state.running:
        if seq.num_planned + 1 >= len(seq.tokens) and seq.gap is None:
            continue
        most = seq.num_ready(state.block_size)
        if seq.first_token_at is not None:
            most = min(most, restored)
            restored -= max(0, most)
        if most > 0:
            found.append((seq, most))
    return found


def _pairs(behind: list[tuple[Sequence, int]], rows: int) -> int:
    """Keys that `rows` further rows see; what is left over goes to one who starts."""
    pairs = 0
    for seq, most in behind:
        taken = min(rows, most)
        pairs += taken * seq.num_planned + taken * taken // 2
        rows -= taken
        if not rows:
            return pairs
    return pairs + rows * rows // 2
