"""The same runs again and again on a machine that is not equally fast at all times.

Every second round goes backwards, so that a drift falls on the first and the last alike. Before and after
each run the same short piece of work says how fast the machine is just then; the simulator beside the run
takes the fitted steps times that, and nothing is fitted anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from statistics import fmean

from ellm.loadtest.open_loop import OpenLoopRun, run_open_loop
from ellm.loadtest.sim.metrics import Metrics
from ellm.worker.api.cost_model import CostModel
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.build import LoadedEngine

PROBE_REQUESTS, PROBE_TOKENS = 16, 96


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of a policy. `slowness`: how long a fixed piece of work took beside it, by the first such."""

    policy: str
    host: str
    round: int
    real: Metrics
    sim: Metrics
    run: OpenLoopRun
    slowness: float


def in_turns(rounds: int, hosts: Sequence[str], policies: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """(round, host tier, policy)."""
    forth = list(product(hosts, policies))
    for number in range(rounds):
        for host, policy in reversed(forth) if number % 2 else forth:
            yield number, host, policy


class Slowness:
    """Times a fixed piece of work: some sequences that decode, with room for all."""

    def __init__(self, load: Callable[[], LoadedEngine], prompts: Sequence[tuple[int, ...]]) -> None:
        self._load = load
        self._prompts = [*prompts[:PROBE_REQUESTS]]
        self._first: float | None = None

    def now(self) -> float:
        """By the first time that this was asked; a second or two of work."""
        sampling = SamplingParams(temperature=0.0, max_tokens=PROBE_TOKENS, ignore_eos=True)
        requests = [EngineRequest(f"probe-{i}", p, sampling) for i, p in enumerate(self._prompts)]
        run = run_open_loop(self._load(), requests, [0.0] * len(requests))
        decoding = [step.elapsed_s for step in run.steps if step.kind == "decode only"]
        seconds = fmean(sorted(decoding)[: -len(decoding) // 20 or None])  # without hiccups
        if self._first is None:
            self._first = seconds
        return seconds / self._first


def slower(model: CostModel, factor: float) -> CostModel:
    """What `model` had learnt if every step had taken `factor` times as long (least squares of relative
    errors: the matrix goes by 1 / time^2, the right-hand side by 1 / time)."""
    data = model.to_dict()
    data["theta"] = [factor * x for x in data["theta"]]
    data["a"] = [[x / factor**2 for x in row] for row in data["a"]]
    data["b"] = [x / factor for x in data["b"]]
    return CostModel.from_dict(data)


def mean_metrics(several: Sequence[Metrics]) -> Metrics:
    """Field by field."""
    return Metrics(**{f.name: fmean(getattr(one, f.name) for one in several) for f in fields(Metrics)})
