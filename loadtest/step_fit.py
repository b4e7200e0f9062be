"""Does a cost model that was fitted on one part of a run say how long the steps of another part take?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np

from ellm.loadtest.open_loop import MeasuredStep
from ellm.worker.api.cost_model import CostModel
from ellm.worker.executor.simulated_link import LinkSpeed

_FEWEST = 20  # steps of a kind, below which percentiles say nothing
_BACK_TO_BACK_S = 0.005  # a longer pause between two steps is idleness
_PASSES = 3


def fit_steps(steps: Sequence[MeasuredStep]) -> CostModel:
    """All count the same, in an order that says nothing."""
    return _fit([(step, step.elapsed_s) for step in steps])


def fit_periods(steps: Sequence[MeasuredStep]) -> CostModel:
    """From the end of a step to that of the next, where nothing was idle: what a step costs a queue. The
    sum over the steps is that of the measured periods: a queue waits for hiccups too, which the fit forgives.
    """
    periods = []
    for before, step in pairwise(steps):
        if step.start_s - before.end_s < _BACK_TO_BACK_S:
            periods.append((step, step.end_s - before.end_s))
    model = _fit(periods)
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


def _fit(timed: Sequence[tuple[MeasuredStep, float]]) -> CostModel:
    model, order = CostModel(forgetting=1.0), Random(0)
    for _ in range(_PASSES):
        for step, seconds in order.sample(timed, len(timed)):
            model.update(step.features, seconds)
    return model


def step_errors(model: CostModel, steps: Sequence[MeasuredStep]) -> dict[str, dict[str, Any]]:
    """By kind of step: p50 and p95 of what was measured and of what the model says, and their relative
    difference; the median error of single steps beside it. Kinds with too few steps are left out."""
    found: dict[str, dict[str, Any]] = {}
    for kind in ("decode only", "mixed", "prefill only"):
        of_kind = [step for step in steps if step.kind == kind]
        if len(of_kind) < _FEWEST:
            continue
        measured = np.array([step.elapsed_s for step in of_kind])
        said = np.array([model.predict(step.features) for step in of_kind])
        figures: dict[str, Any] = {"steps": len(of_kind)}
        for q in (50, 95):
            real, predicted = float(np.percentile(measured, q)), float(np.percentile(said, q))
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
    for kind in ("decode only", "mixed", "prefill only"):
        found = [run["step_errors"][kind] for run in raw["runs"] if kind in run["step_errors"]]
        if found:
            worst = {q: max((one[f"{q}_error"] for one in found), key=abs) for q in ("p50", "p95")}
            first = found[0]
            notes.append(
                f"steps, {kind}: p50 {1e3 * first['p50_s']:.3g} ms and p95 {1e3 * first['p95_s']:.3g} ms "
                f"measured in the held-out half; the model is off by {first['p50_error']:+.1%} and "
                f"{first['p95_error']:+.1%} there, by {worst['p50']:+.1%} and {worst['p95']:+.1%} at worst "
                f"of {len(found)} runs"
            )
    loads = raw["load_average"]
    notes.append(f"the machine's load average was {min(loads):.1f} to {max(loads):.1f} during the runs")
    return notes
