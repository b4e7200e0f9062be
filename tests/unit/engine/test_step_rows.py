"""Rows for prompts where somebody has little slack: what a step as short as a token may take has room for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from ellm.worker.api.cost_model import CostModel
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.engine.gap import Gap
from ellm.worker.engine.planner.admission import TIMELY
from ellm.worker.engine.planner.slack import AIM
from ellm.worker.engine.policies.forecast import Forecast
from ellm.worker.engine.policies.step_rows import free_rows, timely_rows
from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState

COST = CostModel.known(overhead_s=20e-3, knee_rows=100, row_s=20e-6, pair_s=5e-9)
SLO_S = 50e-3
DECODE = 10


def sequence(num_planned: int, known: int, started: bool, gap: Gap | None = None) -> Sequence:
    request = EngineRequest("r", (5,) * known, SamplingParams(max_tokens=500), tpot_slo_s=SLO_S)
    seq = Sequence(request, 0, frozenset())
    seq.num_planned, seq.gap = num_planned, gap
    seq.first_token_at = 0.0 if started else None
    return seq


def state(*others: Sequence) -> EngineState:
    """Ten that decode, and others."""
    running = [*[sequence(500, 501, True)] * DECODE, *others]
    config = SimpleNamespace(max_step_tokens=4096)
    return cast(EngineState, SimpleNamespace(running=running, config=config, block_size=16))


def prompt(at: int, missing: int = 4096) -> Sequence:
    return sequence(at, at + missing, False)


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
    near, far = (timely_rows(state(prompt(n)), forecast, DECODE) for n in (0, 16_000))
    assert far < near / 2
    assert 20e-3 + (far + DECODE - 100) * 20e-6 + far * 16_000 * 5e-9 <= SLO_S


def test_each_row_counts_by_its_own_place() -> None:
    """The end of a long prompt, then a short one: the short one's rows do not see the long one's keys."""
    forecast = Forecast(COST)

    def rows(*prompts: Sequence) -> int:
        return timely_rows(state(*prompts), forecast, DECODE)

    assert rows(prompt(16_000, 20), prompt(0)) > 0.9 * rows(prompt(0), prompt(0))
    assert rows(prompt(0, 300), prompt(16_000)) > 300
    assert rows(prompt(16_000, 300), prompt(0)) < 300


def test_who_comes_back_counts_for_the_rows_that_it_gets() -> None:
    """Free ones at most: the others go to the prompt behind it, and count by that one's place."""
    forecast = Forecast(COST)
    back = sequence(0, 4_000, True)
    free = free_rows(state(back), forecast, DECODE)
    assert 64 < free < 150
    rows = timely_rows(state(back, prompt(16_000)), forecast, DECODE)
    assert rows <= free + timely_rows(state(prompt(16_000)), forecast, DECODE)
    assert 20e-3 + (rows + DECODE - 100) * 20e-6 + (rows - free) * 16_000 * 5e-9 <= SLO_S
    # Where it stands far in, as many as it gets cost their attention.
    assert timely_rows(state(sequence(16_000, 20_000, True)), forecast, DECODE) > 5 * 64


def test_who_waits_for_loads_takes_no_rows() -> None:
    forecast = Forecast(COST)
    gap = Gap(1_000, [7] * 10)  # of 1,010 blocks the last ten come from the host, which may load them all
    waiting = sequence(16_000, 16_160, True, gap)
    alone = timely_rows(state(), forecast, DECODE)
    gap.by_load = True
    assert timely_rows(state(waiting), forecast, DECODE) == alone
    gap.by_load = False  # its rows compute from the front
    assert timely_rows(state(waiting), forecast, DECODE) < alone
    while gap.next_load(1_000) is not None:
        pass  # all are on their way: the two ends have met
    assert timely_rows(state(waiting), forecast, DECODE) == alone


def test_a_prompt_gets_on_even_where_a_step_has_no_room() -> None:
    slow = CostModel.known(overhead_s=60e-3, row_s=1e-3)
    assert timely_rows(state(), Forecast(slow), DECODE) == 64
