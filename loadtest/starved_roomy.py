"""A server with room for all: what prompts continue with, how fast it is, what arrivals hold at once."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean

import numpy as np

from ellm.loadtest.served import Started
from ellm.loadtest.sim.metrics import Metrics, measure
from ellm.loadtest.starved_peer_rows import counters
from ellm.loadtest.starved_workload import (
    Workload,
    ended_bodies,
    endless_bodies,
    expected_of,
    same_share,
)
from ellm.loadtest.timed_requests import send_timed
from ellm.loadtest.unforeseen import peak_context

TIMEOUT_S = 600.0
_NO_SLO_S = 1.0  # of runs that are not judged


@dataclass(slots=True)
class Unstarved:
    """One server with room for all."""

    tok_s: float = 0.0  # all requests at once
    expected: list[list[int]] | None = None
    tpot_p95_s: float = 0.0
    peak_tokens: int = 0
    full_step_s: float = 0.0  # of as many sequences as the starved pool holds
    same: float = 0.0
    metrics: Metrics | None = None

    @property
    def mean_output(self) -> float:
        """Tokens until the stop token, which is not always to be had where it is wanted."""
        assert self.expected is not None
        return fmean(map(len, self.expected))


def at_once(server: Started, work: Workload, found: Unstarved) -> None:
    """What each prompt continues with, and what the server can do."""
    answers = send_timed(server.url, endless_bodies(work), [0.0] * len(work.prompts), TIMEOUT_S)
    found.tok_s = sum(map(len, answers.tokens)) / max(times[-1] for times in answers.token_times)
    found.expected = expected_of(answers.tokens, work.wanted)


def in_time(server: Started, work: Workload, rate: float, found: Unstarved) -> None:
    """The arrivals themselves, with room for all."""
    assert found.expected is not None
    due = work.due_s(rate)
    before = counters(server.url)["preempted"]
    answers = send_timed(server.url, ended_bodies(work, found.expected), due, TIMEOUT_S)
    if counters(server.url)["preempted"] > before:
        raise RuntimeError(f"{server.url} had no room for all")
    found.tpot_p95_s = float(
        np.percentile([tpot(times) for times in answers.token_times if len(times) > 1], 95)
    )
    found.peak_tokens = peak_context(work.prompts, answers.token_times)
    found.same = same_share(answers.tokens, found.expected)
    found.metrics = measure(due, answers.token_times, _NO_SLO_S)


def as_if_full(server: Started, work: Workload, pool_tokens: int, found: Unstarved) -> None:
    """The step of a request whom nobody disturbs while as many run as the starved pool holds: each has said
    half of its output then."""
    each = fmean(map(len, work.prompts)) + found.mean_output / 2
    count = max(1, min(len(work.prompts), round(pool_tokens / each)))
    few = replace(work, prompts=work.prompts[:count], wanted=[round(found.mean_output)] * count)
    answers = send_timed(server.url, endless_bodies(few), [0.0] * count, TIMEOUT_S)
    gaps = [later - sooner for times in answers.token_times for sooner, later in pairwise(times)]
    found.full_step_s = float(np.median(gaps))


def tpot(times: array[float]) -> float:
    return float((times[-1] - times[0]) / (len(times) - 1))
