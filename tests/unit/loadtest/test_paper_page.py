"""docs/paper.md: generated, from every case and rival that the paper names, with its arithmetic."""

from __future__ import annotations

import pytest

from ellm.loadtest.benchmarks_page import newest_results
from ellm.loadtest.paper import PAGE, main, render
from ellm.loadtest.paper_text import PAPER
from ellm.loadtest.sim.paper_runs import RIVALS, cases, literal_step, policies
from ellm.loadtest.sim.run import make_core
from ellm.worker.api.cost_model import CostModel


def test_the_page_is_generated_from_the_results() -> None:
    results = {result["name"]: result for result in newest_results()}
    assert PAGE.read_text() == render(results), "run python -m ellm.loadtest.paper"
    assert main(["--check"]) == 0


def test_every_printed_figure_has_a_case_and_a_rival_of_ours() -> None:
    names = {case.name for case in cases()}
    assert PAPER.keys() <= names
    assert all(set(rivals) == set(RIVALS) for rivals in PAPER.values())


def test_cases_can_be_simulated() -> None:
    for case in cases(requests=2):
        case.setting.check()
        if case.name == "13B, ShareGPT":  # its policies are those of all, and one more
            for policy in policies(case):
                make_core(case.setting, policy, cost_model=CostModel())


def test_recompute_in_every_step_is_far_beyond_the_slo() -> None:
    """13B at the printed cached ratio: 56,000 cached tokens leave 31,600 to recompute at 26 GFLOP each."""
    step = literal_step(cases()[0])
    assert step["tokens recomputed"] == pytest.approx(56_112 * 0.36 / 0.64, rel=0.01)
    assert step["recompute_s"] == pytest.approx(31_563 * 2 * 12.7e9 / 250e12, rel=0.03)
    assert step["over_slo"] > 60
