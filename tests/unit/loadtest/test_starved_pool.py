"""The starved-pool benchmark's own arithmetic: stop tokens, the peak of the context, the check of tokens."""

from __future__ import annotations

from array import array
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from ellm.loadtest.open_loop import PROBE_EVERY, MeasuredStep, OpenLoopRun, RecordingExecutor
from ellm.loadtest.saturated import full_step, middle_rate
from ellm.loadtest.sim.metrics import measure
from ellm.loadtest.starved_rounds import Probe, Sample, in_turns, pace, paces, probing
from ellm.loadtest.starved_rows import rows_of
from ellm.loadtest.step_fit import fit_part, fit_periods, fit_steps, followed, link_speed, slower, step_errors
from ellm.loadtest.unforeseen import Offered, check_tokens, peak_context, stop_index
from ellm.worker.api.cost_model import CostModel, StepFeatures
from ellm.worker.api.report import WorkerReport
from ellm.worker.engine.plan import BatchPlan, ModelLimits, PlanEntry, StepResult, step_features

OFFERED = Offered([0.0, 0.1], [(5, 6), (7,)], [[1, 2, 3], [4, 9]], 50)


def run_of(tokens: list[list[int]], reasons: list[str | None]) -> OpenLoopRun:
    times = [array("d", [1.0 + 0.1 * k for k in range(len(one))]) for one in tokens]
    return OpenLoopRun(times, tokens, reasons, [], WorkerReport(0))


class Noting:
    """An executor that keeps its plans."""

    limits = ModelLimits(Probe.BLOCKS, 16, max_model_len=256, vocab_size=100, eos_token_ids=(0,))

    def __init__(self) -> None:
        self.plans: list[BatchPlan] = []
        self.closed = False

    def execute(self, plan: BatchPlan) -> StepResult:
        self.plans.append(plan)
        return StepResult(plan.step, (), 0.0)

    def close(self) -> None:
        self.closed = True


def test_a_stop_token_appears_for_the_first_time_where_it_ends_the_request() -> None:
    tokens = [8, 8, 3, 8, 3, 5, 5, 3]
    assert [stop_index(tokens, wanted) for wanted in (0, 1, 2, 4, 5, 7)] == [0, 0, 2, 5, 5, 5]
    for wanted in range(len(tokens)):
        at = stop_index(tokens, wanted)
        assert tokens.index(tokens[at]) == at


def test_lengths_are_not_to_be_seen_in_a_request() -> None:
    first, second = OFFERED.requests(0.1)
    assert first.sampling.max_tokens == second.sampling.max_tokens == 50
    assert first.sampling.stop_token_ids == (3,)
    assert (first.tpot_slo_s, first.sampling.temperature) == (0.1, 0.0)


def test_another_token_or_another_end_is_refused() -> None:
    check_tokens(run_of([[1, 2, 3], [4, 9]], ["stop", "stop"]), OFFERED, "x")
    with pytest.raises(AssertionError, match="request 1 says something else"):
        check_tokens(run_of([[1, 2, 3], [4, 8]], ["stop", "stop"]), OFFERED, "x")
    with pytest.raises(AssertionError, match="ended by length"):
        check_tokens(run_of([[1, 2, 3], [4, 9]], ["stop", "length"]), OFFERED, "x")


def test_the_peak_of_the_context_counts_prompts_and_what_was_said() -> None:
    run = run_of([[1, 2, 3], [4, 9]], ["stop", "stop"])
    assert peak_context(OFFERED.prompts, run.token_times) == (2 + 1) + (1 + 1)  # both have said one token
    later = replace(run, token_times=[run.token_times[0], array("d", [5.0, 6.0])])
    assert peak_context(OFFERED.prompts, later.token_times) == 2 + 2  # the last token is never held


def test_capacity_is_of_the_middle_and_of_a_full_pool() -> None:
    run = run_of([[1] * 101], ["stop"])  # ten per second
    assert middle_rate(run) == pytest.approx(10.0)

    def step(rows: int, decode_rows: int, kv_tokens: int, elapsed_s: float) -> MeasuredStep:
        return MeasuredStep(
            StepFeatures(rows, decode_rows, kv_tokens, 0, decode_rows), 0.0, elapsed_s, 0, 0.0
        )

    steps = [step(8, 8, 500, 0.1), step(9, 9, 900, 0.3), step(9, 9, 990, 0.5), step(40, 9, 950, 2.0)]
    assert full_step(replace(run, steps=steps), 1000) == pytest.approx(0.4)
    with pytest.raises(RuntimeError, match="never fills"):
        full_step(replace(run, steps=steps[:1]), 1000)


def steps_of(count: int, truth: CostModel, gap_s: float) -> list[MeasuredStep]:
    steps, now = [], 0.0
    for i in range(count):
        rows = 1 + i % 8
        chunk = 16 if i % 3 == 0 else 0
        features = StepFeatures(rows + chunk, rows, 100 * rows + chunk, chunk * chunk // 2, rows)
        elapsed_s = truth.predict(features)
        steps.append(MeasuredStep(features, now, elapsed_s, 1000, 1e-3))
        now += elapsed_s + gap_s
    return steps


def test_a_small_chunk_costs_what_steps_with_one_say() -> None:
    truth = CostModel.known(overhead_s=5e-3, every_row_s=1e-4, kv_token_s=1e-6)
    rng, steps, now = Random(0), [], 0.0
    for step in steps_of(400, truth, 0.0):
        rows = rng.choice((0, 0, 2, 16, 64))
        features = replace(step.features, rows=step.features.decode_rows + rows)
        elapsed_s = truth.predict(features) + 3e-3 * (rows > 0)
        steps.append(replace(step, features=features, start_s=now, elapsed_s=elapsed_s))
        now += elapsed_s
    fitted = fit_part(steps, [1.0] * 400)
    small = replace(steps[0].features, rows=steps[0].features.decode_rows + 2, attention_pairs=3)
    assert fitted.steps.predict(small) == pytest.approx(truth.predict(small) + 3e-3, rel=0.02)
    periods = fitted.periods
    assert periods.predict(small) == pytest.approx(fitted.steps.predict(small), rel=0.02)
    # What the engine begins with is in its own terms.
    assert (fitted.engine.chunk_term, fitted.engine.forgetting) == (False, CostModel().forgetting)


def test_a_period_in_which_a_probe_ran_is_left_out() -> None:
    truth = CostModel.known(overhead_s=5e-3, every_row_s=1e-4, kv_token_s=1e-6)
    late_s, steps = 0.0, []
    for i, step in enumerate(steps_of(400, truth, 0.0)):
        steps.append(replace(step, start_s=step.start_s + late_s, probed=i % 7 == 6))
        late_s += 2e-3 * (i % 7 == 6)
    features = steps[7].features
    assert fit_periods(steps).predict(features) == pytest.approx(truth.predict(features), rel=0.01)
    unsaid = [replace(step, probed=False) for step in steps]
    assert fit_periods(unsaid).predict(features) > 1.02 * truth.predict(features)


def test_a_fit_on_one_half_says_the_other_by_kind_of_step() -> None:
    truth = CostModel.known(overhead_s=5e-3, every_row_s=1e-4, kv_token_s=1e-6)
    steps = steps_of(400, truth, 1e-3)
    fitted = fit_part(steps[:200], [1.0] * 200)
    errors = step_errors(fitted, steps[200:], [1.0] * 200)
    assert set(errors) == {"decode only", "mixed"}
    for figures in errors.values():
        assert abs(figures["p50_error"]) < 0.02
        assert abs(figures["p95_error"]) < 0.02
    wrong = step_errors(replace(fitted, steps=CostModel.known(overhead_s=1.0)), steps[200:], [1.0] * 200)
    assert wrong["mixed"]["p50_error"] > 10
    features = steps[7].features
    assert fit_periods(steps).predict(features) == pytest.approx(truth.predict(features) + 1e-3, rel=0.02)
    late = [replace(s, start_s=s.start_s + 2e-3 * (i // 10)) for i, s in enumerate(steps)]  # a hiccup in ten
    with_them = fit_periods(late).predict(features) / fit_periods(steps).predict(features)
    whole = late[-1].start_s - late[0].start_s
    assert with_them == pytest.approx(whole / (steps[-1].start_s - steps[0].start_s), rel=0.02)
    assert link_speed(steps).bytes_per_s == pytest.approx(1e6)


def test_steps_scatter_as_they_did_and_the_machine_is_as_slow_as_its_probes_say() -> None:
    truth = CostModel.known(overhead_s=5e-3, every_row_s=1e-4, kv_token_s=1e-6)
    rng = Random(0)
    slowness = [1.0 + 0.5 * (i >= 1000) for i in range(2000)]
    steps = [
        replace(step, elapsed_s=step.elapsed_s * slow * rng.lognormvariate(0.0, 0.2))
        for step, slow in zip(steps_of(2000, truth, 1e-3), slowness, strict=True)
    ]
    fitted = fit_part(steps[:1000], slowness[:1000])
    for figures in step_errors(fitted, steps[1000:], slowness[1000:]).values():
        assert abs(figures["p50_error"]) < 0.05
        assert abs(figures["p95_error"]) < 0.05
    for figures in step_errors(fitted, steps[1000:], [1.0] * 1000).values():
        assert figures["p50_error"] == pytest.approx(1 / 1.5 - 1.0, abs=0.05)
    narrow = replace(fitted, scatter={"any": np.ones(100)})
    assert step_errors(narrow, steps[1000:], slowness[1000:])["decode only"]["p95_error"] < -0.1
    # A machine that was slow while the model learnt does not make it learn slow steps.
    slow_first = fit_part([replace(s, elapsed_s=2 * s.elapsed_s) for s in steps[:1000]], [2.0] * 1000)
    features = steps[7].features
    assert slow_first.steps.predict(features) == pytest.approx(fitted.steps.predict(features), rel=1e-6)


def test_a_probes_pace_counts_as_far_as_steps_followed_it() -> None:
    truth = CostModel.known(overhead_s=5e-3, every_row_s=1e-4, kv_token_s=1e-6)
    rng = Random(0)
    slowness = [1.0 + 0.5 * (i // 100 % 2) for i in range(1600)]
    for share in (0.0, 0.5, 1.0):
        steps = [
            replace(step, elapsed_s=step.elapsed_s * slow**share * rng.lognormvariate(0.0, 0.1))
            for step, slow in zip(steps_of(1600, truth, 1e-3), slowness, strict=True)
        ]
        assert followed(steps, slowness) == pytest.approx(share, abs=0.05)
    assert followed(steps, [1.0] * 1600) == 1.0  # nothing speaks against it


def test_a_slower_machine_scales_the_fit_and_what_it_learns_from_then_on() -> None:
    truth = CostModel.known(overhead_s=5e-3, every_row_s=1e-4, kv_token_s=1e-6)
    steps = steps_of(200, truth, 0.0)
    fast = fit_steps(steps)
    features = steps[7].features
    slow = slower(fast, 2.0)
    assert slow.predict(features) == pytest.approx(2 * fast.predict(features))
    assert fast.predict(features) == pytest.approx(truth.predict(features), rel=0.02)  # left alone
    for step in steps:  # what it knows agrees with steps that take twice as long
        slow.update(step.features, 2 * step.elapsed_s)
    assert slow.predict(features) == pytest.approx(2 * truth.predict(features), rel=0.02)


def test_rounds_go_forth_and_back_and_a_row_is_their_mean() -> None:
    turns = list(in_turns(2, ["off", "on"], ["full-recompute", "adaptive"]))
    assert [turn[1:] for turn in turns[4:]] == [turn[1:] for turn in reversed(turns[:4])]
    assert [turn[0] for turn in turns] == [0] * 4 + [1] * 4
    samples = []
    for number, host, policy in turns:
        run = run_of([[1, 2, 3]], ["stop"])
        late = 1.0 + number + (policy == "adaptive")
        run = replace(run, token_times=[array("d", [late + 0.1 * k for k in range(3)])])
        real = measure([0.0], run.token_times, 0.2)
        samples.append(Sample(policy, host, number, real, real, run, 1.0 + number))
    rows = rows_of(samples)
    assert [(row["policy"], row["host tier"], row["TTFT mean, s"]) for row in rows] == [
        ("full-recompute", "off", 1.5),
        ("adaptive", "off", 2.5),
        ("full-recompute", "on", 1.5),
        ("adaptive", "on", 2.5),
    ]
    # Within a round and a host setting: 1 by 2 seconds, and 2 by 3.
    assert [row.get("ratio TTFT") for row in rows] == [
        None,
        pytest.approx(7 / 12),
        None,
        pytest.approx(7 / 12),
    ]
    assert (rows[0]["machine"], rows[0]["sim TTFT error"]) == (1.5, 0.0)


def test_pairs_are_further_rounds_of_the_two_that_are_compared() -> None:
    turns = list(in_turns(1, ["off", "on"], ["a", "b", "c"], 2, ("a", "b")))
    assert [policy for number, _, policy in turns if number == 0] == ["a", "b", "c"] * 2
    assert turns[6:] == [
        *[(1, host, policy) for host in ("on", "off") for policy in ("b", "a")],
        *[(2, host, policy) for host in ("off", "on") for policy in ("a", "b")],
    ]


def test_the_pace_of_a_run_is_that_of_its_probes_without_hiccups() -> None:
    run = replace(run_of([[1]], ["stop"]), probe_s=[2.0] * 38 + [900.0, 900.0])
    assert pace(run) == 2.0
    assert pace(replace(run, probe_s=[3.0])) == 3.0
    assert pace(replace(run, probe_s=[])) == 0.0


def test_a_probe_is_a_step_that_is_always_the_same_and_leaves_nothing() -> None:
    executor = Noting()
    probe = Probe(executor)
    for _ in range(3):
        assert probe() > 0.0
    probe.close()
    assert executor.closed
    assert [plan.step for plan in executor.plans] == list(range(6))
    steps, ends = executor.plans[::2], executor.plans[1::2]
    assert {step_features(plan) for plan in steps} == {StepFeatures(16, 16, 16 * 145, 0, 16)}
    named = [block for entry in steps[0].entries for block in entry.block_ids]
    assert sorted(named) == list(range(Probe.BLOCKS))
    for step, end in zip(steps, ends, strict=True):
        assert {new.seq_id for new in step.new} == set(end.released)
        assert not end.entries


def test_a_probe_runs_after_so_many_steps_and_is_noted() -> None:
    executor = RecordingExecutor(Noting(), probe=lambda: 0.5)
    entry = PlanEntry(0, 0, 1, (5,), [0], True)
    for step in range(2 * PROBE_EVERY + 1):
        executor.execute(BatchPlan(step, (entry,), (), (), 1, 1))
    assert executor.probe_s == [0.5, 0.5]
    assert [i for i, s in enumerate(executor.steps) if s.probed] == [PROBE_EVERY - 1, 2 * PROBE_EVERY - 1]


def test_what_probes_took_counts_as_a_share_of_the_steps() -> None:
    run = replace(run_of([[1]], ["stop"]), steps=steps_of(10, CostModel.known(overhead_s=5e-3), 0.0))
    assert probing(replace(run, probe_s=[2e-3, 3e-3])) == pytest.approx(0.1)
    assert probing(run) == probing(run_of([[1]], ["stop"])) == 0.0


def test_the_pace_at_a_step_is_that_of_the_probes_around_it() -> None:
    truth = CostModel.known(overhead_s=5e-3)
    run = replace(run_of([[1]], ["stop"]), steps=steps_of(40 * PROBE_EVERY + 3, truth, 0.0))
    run = replace(run, probe_s=[1.0] * 20 + [3.0] * 20)
    found = paces(replace(run, probe_s=[*run.probe_s[:5], 900.0, *run.probe_s[6:]]))
    assert len(found) == len(run.steps)
    assert set(found[: 15 * PROBE_EVERY]) == {1.0}
    assert set(found[25 * PROBE_EVERY :]) == {3.0}
    assert set(paces(replace(run, probe_s=[]))) == {0.0}


def test_steps_that_are_asked_for_ahead_cost_what_lies_between_their_ends() -> None:
    """As on a GPU: step i + 1 is asked for when step i - 1 has been told."""
    truth = CostModel.known(overhead_s=5e-3, every_row_s=1e-4, kv_token_s=1e-6)
    steps, ends = [], [0.0, 0.0]
    for step in steps_of(200, truth, 0.0):
        ends.append(ends[-1] + step.elapsed_s)
        steps.append(replace(step, start_s=ends[-3], told_s=ends[-1]))
    features = steps[6].features  # with a chunk, behind a step without
    assert fit_periods(steps).predict(features) == pytest.approx(truth.predict(features), rel=0.02)
