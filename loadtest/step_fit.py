"""Does a cost model that was fitted on one part of a run say how long the steps of another part take?

What is said of a step is a distribution: what the model says, times how slow the machine is just then, times
how steps of the fitted part scattered around the model. So are its percentiles; nothing of it is taken from
the part that is judged but the machine's pace, which is measured by other work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np

from ellm.loadtest.open_loop import PROBE_EVERY, MeasuredStep
from ellm.worker.api.cost_model import CostModel
from ellm.worker.executor.simulated_link import LinkSpeed

_FEWEST = 20  # steps of a kind, below which percentiles say nothing
_BACK_TO_BACK_S = 0.005  # a longer pause between two steps is idleness
_PASSES = 3
_SCATTER = 100  # quantiles
_STEADY = 0.02  # a pace that varied less says little of how far steps follow it
KINDS = ("decode only", "mixed", "prefill only")
StepErrors = dict[str, dict[str, Any]]  # by kind


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a part of a run has taught, for a machine at its reference speed."""

    steps: CostModel
    periods: CostModel
    engine: CostModel  # the periods in an engine's terms, which forgets as an engine's own does
    scatter: dict[str, np.ndarray]  # by kind of step, and "any": (100,) quantiles of measured over said


def fit_part(steps: Sequence[MeasuredStep], slowness: Sequence[float]) -> Fitted:
    """`slowness`: of the machine at each step, 1 at its reference speed."""
    model = fit_steps(steps, slowness, chunk_term=True)
    measured = np.array([step.elapsed_s for step in steps]) / np.array(slowness)
    ratios = measured / np.array([model.predict(step.features) for step in steps])
    kinds = np.array([step.kind for step in steps])
    places = (np.arange(_SCATTER) + 0.5) / _SCATTER
    scatter = {"any": np.quantile(ratios, places)}
    for kind in KINDS:
        if (kinds == kind).sum() >= _FEWEST:
            scatter[kind] = np.quantile(ratios[kinds == kind], places)
    periods, plain = (fit_periods(steps, slowness, chunk_term=term) for term in (True, False))
    engine = CostModel.from_dict(plain.to_dict() | {"forgetting": CostModel().forgetting})
    return Fitted(model, periods, engine, scatter)


def followed(steps: Sequence[MeasuredStep], slowness: Sequence[float]) -> float:
    """How far steps followed what was said of the machine's pace, 0 to 1: b of `slowness^b`, by least squares
    over stretches of steps. What slows a probe may be its own affair. What varied little is believed: the
    steps have nothing to say of it."""
    model = fit_steps(steps, chunk_term=True)
    ratios = np.log([step.elapsed_s / model.predict(step.features) for step in steps])
    stretches = range(0, len(steps), PROBE_EVERY)
    y = np.array([np.median(ratios[i : i + PROBE_EVERY]) for i in stretches])
    x = np.array([np.mean(np.log(slowness[i : i + PROBE_EVERY])) for i in stretches])
    x, y, belief = x - x.mean(), y - np.median(y), len(x) * _STEADY**2
    return min(1.0, max(0.0, (float(x @ y) + belief) / (float(x @ x) + belief)))


def fit_steps(
    steps: Sequence[MeasuredStep], slowness: Sequence[float] | None = None, *, chunk_term: bool = False
) -> CostModel:
    """All count the same, in an order that says nothing."""
    by = slowness or [1.0] * len(steps)
    return _fit([(step, step.elapsed_s / slow) for step, slow in zip(steps, by, strict=True)], chunk_term)


def fit_periods(
    steps: Sequence[MeasuredStep], slowness: Sequence[float] | None = None, *, chunk_term: bool = False
) -> CostModel:
    """From the end of a step to that of the next, where nothing was idle: what a step costs a queue. The
    sum over the steps is that of the measured periods: a queue waits for hiccups too, which the fit forgives.
    """
    by = slowness or [1.0] * len(steps)
    periods = []
    for (before, step), slow in zip(pairwise(steps), by[1:], strict=True):
        period_s = step.end_s - before.end_s
        at_once = step.start_s - before.end_s < _BACK_TO_BACK_S
        if period_s > 0.0 and at_once and not before.probed:  # nor two runs end to end
            periods.append((step, period_s / slow))
    model = _fit(periods, chunk_term)
    said = sum(model.predict(step.features) for step, _ in periods)
    return slower(model, sum(seconds for _, seconds in periods) / said) if said else model


def slower(model: CostModel, factor: float) -> CostModel:
    """What `model` had learnt if every step had taken `factor` times as long (least squares of relative
    errors: the matrix goes by 1 / time^2, the right-hand side by 1 / time)."""
    data = model.to_dict()
    data["theta"] = [factor * x for x in data["theta"]]
    data["a"] = [[x / factor**2 for x in row] for row in data["a"]]
    data["b"] = [x / factor for x in data["b"]]
    return CostModel.from_dict(data)


def _fit(timed: Sequence[tuple[MeasuredStep, float]], chunk_term: bool) -> CostModel:
    model, order = CostModel(forgetting=1.0, chunk_term=chunk_term), Random(0)
    for _ in range(_PASSES):
        for step, seconds in order.sample(timed, len(timed)):
            model.update(step.features, seconds)
    return model


def step_errors(fitted: Fitted, steps: Sequence[MeasuredStep], slowness: Sequence[float]) -> StepErrors:
    """By kind of step: p50 and p95 of what was measured and of what is said, and their relative difference;
    beside it the median error of single steps. Kinds with too few steps are left out."""
    found: StepErrors = {}
    for kind in KINDS:
        of_kind = [(step, slow) for step, slow in zip(steps, slowness, strict=True) if step.kind == kind]
        if len(of_kind) < _FEWEST:
            continue
        measured = np.array([step.elapsed_s for step, _ in of_kind])
        said = np.array([fitted.steps.predict(step.features) * slow for step, slow in of_kind])
        spread = np.outer(said, fitted.scatter.get(kind, fitted.scatter["any"]))
        figures: dict[str, Any] = {"steps": len(of_kind)}
        for q in (50, 95):
            real, predicted = float(np.percentile(measured, q)), float(np.percentile(spread, q))
            figures |= {
                f"p{q}_s": real,
                f"predicted_p{q}_s": predicted,
                f"p{q}_error": predicted / real - 1.0,
            }
        figures["single_step_error"] = float(np.median(np.abs(said / measured - 1.0)))
        found[kind] = figures
    return found


def link_speed(steps: Sequence[MeasuredStep]) -> LinkSpeed:
    """Of the copies that were measured; the default's where there were none."""
    moved, seconds = sum(s.moved_bytes for s in steps), sum(s.moving_s for s in steps)
    return LinkSpeed(bytes_per_s=moved / seconds) if moved and seconds else LinkSpeed()


def notes_of(raw: dict[str, Any]) -> list[str]:
    """How well the cost model says the steps that it has not seen, by kind, at worst over the runs."""
    notes = []
    for kind in KINDS:
        found = [run["step_errors"][kind] for run in raw["runs"] if kind in run["step_errors"]]
        if found:
            worst = {q: max((one[f"{q}_error"] for one in found), key=abs) for q in ("p50", "p95")}
            every = raw["step_errors"][kind]
            notes.append(
                f"steps, {kind}: p50 {1e3 * every['p50_s']:.3g} ms and p95 {1e3 * every['p95_s']:.3g} ms "
                "measured, of all that the fit had not seen; the model is off by "
                f"{every['p50_error']:+.1%} and {every['p95_error']:+.1%}, "
                f"by {worst['p50']:+.1%} and {worst['p95']:+.1%} at worst of {len(found)} single runs"
            )
    if any(run.get("probing") for run in raw["runs"]):
        took = max(run["probing"] for run in raw["runs"])
        notes.append(
            f"the step between the others that is always the same took {took:.1%} of their time at most; the "
            f"fitted steps followed its pace by {raw['followed']:.2f}"
        )
    loads = raw["load_average"]
    notes.append(f"the machine's load average was {min(loads):.1f} to {max(loads):.1f} during the runs")
    return notes
