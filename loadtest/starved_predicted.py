"""What the simulator says of runs on a starved pool, by a cost model that knows a part of one policy's alone.

The model is fitted once, on the first half of the steps of each run of one policy: of several runs, since a
machine is not equally fast at all times. It says the steps of the other halves and of all other
policies. Nothing is fitted anew for another policy; measured in each run is how fast the machine was just
then, by a step that is none of its own and as far as the fitted steps followed that, and how fast its link to
the host tier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from ellm.loadtest.open_loop import MeasuredStep
from ellm.loadtest.sim.device import EOS, VOCAB_SIZE
from ellm.loadtest.sim.executor import TimedExecutor
from ellm.loadtest.sim.metrics import Metrics, measure
from ellm.loadtest.sim.replica import Replica
from ellm.loadtest.starved_rounds import Sample, Taken, pace, paces, probing
from ellm.loadtest.step_fit import Fitted, StepErrors, fit_part, followed, link_speed, slower, step_errors
from ellm.loadtest.unforeseen import Offered
from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.cost_model import CostModel
from ellm.worker.engine.core import EngineCore
from ellm.worker.engine.plan import ModelLimits
from ellm.worker.executor.simulated_link import LinkSpeed

FITTED = "full-chunked"  # in its runs there are steps of every kind


def fitted_policy(policies: Sequence[str]) -> str:
    """Whose steps the model learns; of these, in the order in which they run."""
    return FITTED if FITTED in policies else policies[0]


@dataclass(frozen=True, slots=True)
class Said:
    """What is said of some runs: each with the simulator's figures beside it, and the errors of the steps
    that the fit has not seen, by run and of all together. `followed`: how far steps followed the probes."""

    samples: list[Sample]
    errors: list[StepErrors]
    errors_of_all: StepErrors
    followed: float


def predict(offered: Offered, taken: Sequence[Taken], slo_s: float) -> Said:
    of = fitted_policy([one.policy for one in taken])
    known = [one for one in taken if one.policy == of]
    probes = 1.0 + fmean(probing(one.run) for one in known)  # they lie between the steps
    reference_s = fmean(pace(one.run) for one in known) or 1.0
    fitted, share = _fit(known, reference_s)
    samples, errors = [], []
    unseen: list[MeasuredStep] = []
    paces_of_unseen: list[float] = []
    for one in taken:
        slow = [slowness**share for slowness in _slowness(one, reference_s)]
        slowness = fmean(slow) if slow else 1.0  # the statistic that the fit was normalised by
        cost, own = (slower(model, slowness * probes) for model in (fitted.periods, fitted.engine))
        link = link_speed(one.run.steps)
        sim = simulate(offered, one.limits, one.config, cost, own, link, slo_s)
        samples.append(Sample(one.policy, one.host, one.round, one.real, sim, one.run, slowness))
        seen = _half(one) if one.policy == of else 0
        errors.append(step_errors(fitted, one.run.steps[seen:], slow[seen:]))
        unseen += one.run.steps[seen:]
        paces_of_unseen += slow[seen:]
    return Said(samples, errors, step_errors(fitted, unseen, paces_of_unseen), share)


def _fit(known: Sequence[Taken], reference_s: float) -> tuple[Fitted, float]:
    """And how far steps follow the probes."""
    steps: list[MeasuredStep] = []
    slow: list[float] = []
    for one in known:
        steps += one.run.steps[: _half(one)]
        slow += _slowness(one, reference_s)[: _half(one)]
    share = followed(steps, slow)
    return fit_part(steps, [slowness**share for slowness in slow]), share


def _half(one: Taken) -> int:
    return len(one.run.steps) // 2


def _slowness(one: Taken, reference_s: float) -> list[float]:
    """Of the machine at each step."""
    return [seconds / reference_s or 1.0 for seconds in paces(one.run)]


def simulate(
    offered: Offered,
    limits: ModelLimits,
    config: WorkerConfig,
    cost: CostModel,
    own: CostModel,
    link: LinkSpeed,
    slo_s: float,
) -> Metrics:
    """The same arrivals in simulated time, by `cost`. `own` is what the engine begins with; it learns on."""
    limits = replace(limits, eos_token_ids=(EOS,), vocab_size=VOCAB_SIZE)
    requests = offered.sim_requests()
    ends = [request.output_tokens for request in requests]
    executor = TimedExecutor(limits, cost, lambda new: ends[new.sampling.seed], link)
    replica = Replica(EngineCore(limits, config, cost_model=own), executor, requests, tpot_slo_s=slo_s)
    trajectory = replica.run()
    return measure(offered.arrivals, trajectory.token_times, slo_s)
