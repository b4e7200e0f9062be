"""What is said of runs on a starved pool comes from halves of the first policy's runs alone."""

from __future__ import annotations

from array import array
from dataclasses import replace
from itertools import count, cycle

import pytest

from ellm.loadtest.open_loop import PROBE_EVERY, MeasuredStep, OpenLoopRun
from ellm.loadtest.sim.metrics import measure
from ellm.loadtest.starved_predicted import FITTED, fitted_policy, predict
from ellm.loadtest.starved_rounds import Taken
from ellm.loadtest.unforeseen import Offered
from ellm.worker.api.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.cost_model import StepFeatures
from ellm.worker.api.report import WorkerReport
from ellm.worker.engine.plan import ModelLimits

OFFERED = Offered([0.0, 0.2], [(5, 6, 7), (7, 8)], [[1, 2, 3, 4], [4, 9]], 50)
LIMITS = ModelLimits(num_blocks=64, block_size=16, max_model_len=256, vocab_size=100, eos_token_ids=(0,))
STEPS = 320
PROBE_S = 1e-4
_runs = count()


def taken(policy: str, host: str, halves_s: tuple[float, float], *probes_s: float) -> Taken:
    """A run of steps of one kind: so long in its first half, and in its second. What its probes take goes
    around."""
    steps, now = [], 100.0 * next(_runs)  # one after another
    for i in range(STEPS):
        rows = 1 + i % 7
        step = MeasuredStep(StepFeatures(rows, rows, 100, 0, rows), now, halves_s[2 * i // STEPS], 0, 0.0)
        steps.append(step)
        now = step.end_s
    times = [array("d", [0.5, 0.6, 0.7, 0.8]), array("d", [0.7, 0.8])]
    run = OpenLoopRun(times, list(OFFERED.expected), ["stop"] * 2, steps, WorkerReport(0))
    probes = cycle(probes_s or [PROBE_S])
    run = replace(run, probe_s=[next(probes) for _ in range(STEPS // PROBE_EVERY)])
    config = WorkerConfig(
        model=ModelConfig(path="x"),
        cache=CacheConfig(num_blocks=64),
        scheduler=SchedulerConfig(policy=policy),
    )
    return Taken(policy, host, 0, config, LIMITS, run, measure(OFFERED.arrivals, times, 0.1))


def errors_of(several: list[Taken]) -> list[float]:
    """Of the median step, by run."""
    return [errors["decode only"]["p50_error"] for errors in predict(OFFERED, several, 0.1).errors]


def test_the_fit_knows_the_first_halves_of_the_first_policys_runs() -> None:
    first = [taken("full-recompute", host, (0.01, 0.02)) for host in ("off", "on")]
    other = taken("adaptive", "off", (0.01, 0.01))
    assert errors_of([first[0], other, first[1]]) == pytest.approx([-0.5, 0.0, -0.5], abs=0.02)
    together = predict(OFFERED, [first[0], other, first[1]], 0.1).errors_of_all["decode only"]
    assert together["steps"] == 2 * STEPS  # two halves and a whole
    # Another policy's steps teach nothing, whatever they take.
    slow = taken("adaptive", "off", (0.04, 0.04))
    assert errors_of([first[0], slow, first[1]]) == pytest.approx([-0.5, -0.75, -0.5], abs=0.02)
    # Of two runs of the first, the one that was slow without its probes' knowing counts like the other.
    second = taken("full-recompute", "on", (0.012, 0.012))
    found = errors_of([taken("full-recompute", "off", (0.01, 0.01)), second])
    assert found[0] > 0.02
    assert found[1] < -0.02


def test_a_run_on_a_slower_machine_is_said_to_take_longer() -> None:
    fast, slow = (
        taken("full-recompute", "off", (0.01, 0.01)),
        taken("adaptive", "off", (0.02, 0.02), 2 * PROBE_S),
    )
    assert errors_of([fast, slow]) == pytest.approx([0.0, 0.0], abs=0.02)
    samples = predict(OFFERED, [fast, slow], 0.1).samples
    assert [sample.slowness for sample in samples] == pytest.approx([1.0, 2.0])
    ttft = [sample.sim.ttft_mean_s for sample in samples]
    assert ttft[1] == pytest.approx(2 * ttft[0], rel=0.05)
    assert [sample.real for sample in samples] == [fast.real, slow.real]


def test_a_probe_that_now_and_then_takes_long_makes_no_run_longer() -> None:
    def ttft(*probes_s: float) -> float:
        runs = [taken(policy, "off", (0.01, 0.01), *probes_s) for policy in ("full-recompute", "adaptive")]
        return predict(OFFERED, runs, 0.1).samples[1].sim.ttft_mean_s

    skewed = ttft(*[PROBE_S] * 3, 2.5 * PROBE_S)  # their mean is 1.4 times their median
    assert skewed == pytest.approx(ttft(PROBE_S), rel=0.02)


def test_a_policy_whose_steps_are_of_all_kinds_is_fitted_where_it_runs() -> None:
    runs = [
        taken("full-recompute", "off", (0.04, 0.04)),
        taken(FITTED, "off", (0.01, 0.02)),
        taken("adaptive", "off", (0.01, 0.01)),
    ]
    assert errors_of(runs) == pytest.approx([-0.75, -0.5, 0.0], abs=0.02)
    assert fitted_policy(["full-recompute", "adaptive"]) == "full-recompute"


def test_what_probes_took_in_the_fitted_runs_comes_between_the_steps_of_all() -> None:
    """Ten of 32 ms beside 320 steps of 10 ms: a tenth. They say nothing of how long a step is."""
    long_s = STEPS / (STEPS // PROBE_EVERY) * 0.01 / 10
    runs = [taken(policy, "off", (0.01, 0.01), long_s) for policy in ("full-recompute", "adaptive")]
    short = [taken(policy, "off", (0.01, 0.01)) for policy in ("full-recompute", "adaptive")]
    assert errors_of(runs) == pytest.approx([0.0, 0.0], abs=0.02)
    for with_them, without in zip(
        predict(OFFERED, runs, 0.1).samples, predict(OFFERED, short, 0.1).samples, strict=True
    ):
        assert with_them.sim.ttft_mean_s == pytest.approx(1.1 * without.sim.ttft_mean_s, rel=0.01)
    # A policy of shorter steps gets no less: what its run was like is not looked at.
    other = [runs[0], taken("adaptive", "off", (0.005, 0.005), long_s)]
    assert predict(OFFERED, other, 0.1).samples[1].sim == predict(OFFERED, runs, 0.1).samples[1].sim


def test_without_probes_the_machine_counts_as_steady() -> None:
    bare = [
        replace(one, run=replace(one.run, probe_s=[]))
        for one in (taken("full-recompute", "off", (0.01, 0.01)), taken("adaptive", "off", (0.01, 0.01)))
    ]
    samples = predict(OFFERED, bare, 0.1).samples
    assert [sample.slowness for sample in samples] == [1.0, 1.0]
