"""Requests whose end the engine cannot foresee, and what each of them must say.

All ask for the same `max_tokens` and end by a stop token of their own: one that their continuation is known
to contain, for the first time at the place where the request shall end.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

from ellm.loadtest.open_loop import OpenLoopRun
from ellm.loadtest.sim.workload import SIGMA, SimRequest
from ellm.worker.api.request import EngineRequest, SamplingParams


@dataclass(frozen=True, slots=True)
class Offered:
    """What comes, and what each request must say."""

    arrivals: list[float]
    prompts: list[tuple[int, ...]]
    expected: list[list[int]]  # output tokens, the stop token last
    max_tokens: int
    temperature: float = 0.0  # drawn by a seed of each request

    def requests(self, slo_s: float | None) -> list[EngineRequest]:
        made = []
        for i, (prompt, tokens) in enumerate(zip(self.prompts, self.expected, strict=True)):
            sampling = SamplingParams(
                temperature=self.temperature,
                seed=i,
                max_tokens=self.max_tokens,
                ignore_eos=True,
                stop_token_ids=(tokens[-1],),
            )
            made.append(EngineRequest(str(i), prompt, sampling, tpot_slo_s=slo_s))
        return made

    def sim_requests(self) -> list[SimRequest]:
        return [
            SimRequest(at, len(prompt), len(tokens), self.max_tokens)
            for at, prompt, tokens in zip(self.arrivals, self.prompts, self.expected, strict=True)
        ]


def stop_index(tokens: Sequence[int], wanted: int) -> int:
    """The place nearest to `wanted` (an index) whose token appears there for the first time."""
    firsts = [i for i, token in enumerate(tokens) if tokens.index(token) == i]
    return min(firsts, key=lambda i: (abs(i - wanted), i))


def lengths(rng: random.Random, mean: float, cap: int, count: int) -> list[int]:
    """Lognormal, in [4, cap]; `mean` is that before the bounds."""
    middle = mean / exp(SIGMA * SIGMA / 2)
    return [max(4, min(cap, round(middle * rng.lognormvariate(0.0, SIGMA)))) for _ in range(count)]


def peak_context(prompts: Sequence[Sequence[int]], token_times: Sequence[Sequence[float]]) -> int:
    """Most tokens of context that were held at once, from each first token to each last."""
    events: list[tuple[float, int]] = []
    for prompt, times in zip(prompts, token_times, strict=True):
        events.append((times[0], len(prompt)))
        events += [(at, 1) for at in times]
        events.append((times[-1], -len(prompt) - len(times)))
    held = peak = 0
    for _, change in sorted(events):
        held += change
        peak = max(peak, held)
    return peak


def check_tokens(run: OpenLoopRun, offered: Offered, name: str) -> None:
    """Raises AssertionError where a token is not the roomy run's."""
    for i, (tokens, expected) in enumerate(zip(run.tokens, offered.expected, strict=True)):
        assert tokens == expected, f"{name}: request {i} says something else"
        assert run.finish_reasons[i] == "stop", f"{name}: request {i} ended by {run.finish_reasons[i]}"
