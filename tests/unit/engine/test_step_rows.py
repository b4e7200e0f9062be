"""Rows for prompts where somebody has little slack: what a step as short as a token may take has room for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from ellm.worker.api.cost_model import CostModel
from ellm.worker.engine.planner.admission import TIMELY
from ellm.worker.engine.planner.slack import AIM
from ellm.worker.engine.policies.forecast import Forecast
from ellm.worker.engine.policies.step_rows import free_rows, timely_rows
from ellm.worker.engine.state import EngineState

COST = CostModel.known(overhead_s=20e-3, knee_rows=100, row_s=20e-6, pair_s=5e-9)
SLO_S = 50e-3
DECODE = 10


def sequence(num_planned: int, started: bool) -> Any:
    first = 0.0 if started else None
    return SimpleNamespace(num_planned=num_planned, first_token_at=first, gap=None, tpot_slo_s=SLO_S)


def state(*prompts: int) -> EngineState:
    """Ten that decode, and some that are at these places of their prompts."""
    running = [sequence(500, True)] * DECODE + [sequence(n, False) for n in prompts]
    return cast(EngineState, SimpleNamespace(running=running, config=SimpleNamespace(max_step_tokens=4096)))


def test_prompts_take_what_a_timely_step_has_room_for() -> None:
    forecast = Forecast(COST)
    assert free_rows(state(), forecast, DECODE) < 150
    rows = timely_rows(state(), forecast, DECODE)
    allowed = TIMELY * AIM * SLO_S
    took = 20e-3 + (rows + DECODE - 100) * 20e-6 + rows * rows / 2 * 5e-9
    assert took == pytest.approx(allowed, rel=0.03)
    assert took <= allowed + 1e-6


def test_a_chunk_far_into_its_prompt_counts_with_its_attention() -> None:
    forecast = Forecast(COST)
    near, far = (timely_rows(state(n), forecast, DECODE) for n in (0, 16_000))
    assert far < near / 2
    assert 20e-3 + (far + DECODE - 100) * 20e-6 + far * 16_000 * 5e-9 <= SLO_S


def test_a_prompt_gets_on_even_where_a_step_has_no_room() -> None:
    slow = CostModel.known(overhead_s=60e-3, row_s=1e-3)
    assert timely_rows(state(), Forecast(slow), DECODE) == 64
