"""The paper's optimisation problem: its terms by hand, its solutions against a search over a grid."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from ellm.loadtest.sim.device import Device
from ellm.loadtest.sim.literature import make_policy
from ellm.loadtest.sim.presets import MODELS, find_gpu
from ellm.loadtest.sim.run import simulate
from ellm.loadtest.sim.setting import Setting
from ellm.loadtest.sim.slsqp import Problem, solve
from ellm.worker.api.config import SchedulerConfig
from ellm.worker.api.cost_model import StepFeatures
from ellm.worker.api.errors import ConfigError

COST = Device(MODELS["llama2-13b"], find_gpu("a100-80g")).cost()
ROOMY = Problem(1_000.0, 56_112, 256, 2_048, 0.1, COST.coefficients)
STARVED = Problem(50.0, 128, 64, 2_048, 0.1, COST.coefficients)

needs_scipy = pytest.mark.needs_module("scipy")


def best_of_grid(problem: Problem) -> float:
    """b / T of the best feasible point of a fine grid."""
    counts = [problem.most_requests * i / 200 for i in range(1, 201)]
    ratios = [0.95 * i / 190 for i in range(191)]
    points = (point for point in product(counts, ratios) if problem.feasible(*point))
    return max(count / problem.step_s(count, ratio) for count, ratio in points)


def test_a_step_is_what_the_cost_model_says() -> None:
    for count, ratio in ((10, 0.0), (10, 0.1), (40, 0.02)):
        holes = round(count * ratio * 1_000)
        pairs = round(0.5 * count * (ratio * 1_000) ** 2)
        whole = StepFeatures(count + holes, count, count * 1_000 + holes, pairs, count)
        assert ROOMY.step_s(count, ratio) == pytest.approx(COST.predict(whole))


def test_what_is_left_of_memory_rows_and_time() -> None:
    rooms = ROOMY.rooms(28.0, 0.5)
    assert rooms[0] == pytest.approx(1 - 14_000 / 56_112)
    assert rooms[1] == pytest.approx(1 - 28 * 501 / 2_048)
    assert rooms[2] == pytest.approx(1 - ROOMY.step_s(28.0, 0.5) / 0.1)
    assert not ROOMY.feasible(28.0, 0.5)
    assert ROOMY.feasible(28.0, 0.0)
    assert len(replace(ROOMY, limit_s=None).rooms(1.0, 0.0)) == 2


@needs_scipy
@pytest.mark.parametrize("start", [(1.0, 0.0), (40.0, 0.1)])
def test_with_memory_to_spare_nothing_is_left_out_but_what_costs_nothing(start: tuple[float, float]) -> None:
    found = solve(ROOMY, *start)
    assert found is not None
    count, ratio = found
    assert ratio < 0.01  # a step's spare rows recompute that much
    assert ROOMY.feasible(*found, slack=1e-3)
    assert count / ROOMY.step_s(*found) > 0.99 * best_of_grid(ROOMY)


@needs_scipy
def test_starved_of_memory_most_is_left_out() -> None:
    found = solve(STARVED, 2.0, 0.0)
    assert found is not None
    count, ratio = found
    assert ratio > 0.2
    assert count > 128 / 50  # more than memory holds whole
    assert count / STARVED.step_s(*found) > 0.97 * best_of_grid(STARVED)


@needs_scipy
def test_an_slo_that_cannot_be_kept_has_no_solution() -> None:
    assert solve(replace(ROOMY, limit_s=1e-3), 1.0, 0.0) is None


@needs_scipy
def test_a_run_reports_what_the_solver_took(tmp_path: Path) -> None:
    trace = tmp_path / "chats.csv"
    rows = "".join(f"{i},50,40\n" for i in range(6))
    trace.write_text(f"Timestamp,Request tokens,Response tokens\n{rows}")
    setting = Setting(num_requests=6, rate=50.0, kv_bytes=2.2e8, workload=str(trace), tpot_slo_ms=100.0)
    found = simulate(setting, "slsqp", 1)
    assert found["throughput_tok_s"] > 0.0
    assert 0.0 < found["solver_mean_ms"] <= found["solver_worst_ms"]
    assert 0.0 <= found["solver_failed_share"] < 0.5
    assert "solver_mean_ms" not in simulate(setting, "full-chunked", 1)


def test_without_scipy_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ConfigError, match=r"policy slsqp needs scipy: pip install 'ellm-on-ray\[slsqp\]'"):
        make_policy(SchedulerConfig(policy="slsqp"))
