"""What comes in the KV-starved comparison: arrivals of a trace, lengths, and ends that no server foresees.

Every request asks for the same large `max_tokens` and is ended by a stop token: one that the side's own
continuation of the prompt has for the first time at the place nearest to where the request shall end. Knows
no server.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ellm.loadtest.bench_checkpoint import SHAPE
from ellm.loadtest.generator.arrivals import arrival_times, stretched
from ellm.loadtest.sim.traces import read_trace
from ellm.loadtest.unforeseen import lengths, stop_index

SLACK_TOKENS = 64  # beyond the wanted end, to find a token that comes there for the first time
FIRST_ID = 8  # of prompts: above the special ones
AZURE_CV = 1.7  # of the gaps, where no trace is given: that of the Azure conversation trace


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts, where each answer shall end, and when they come at a rate of 1 per second."""

    prompts: list[list[int]]
    wanted: list[int]  # output tokens
    arrivals: list[float]
    max_tokens: int

    def due_s(self, rate: float) -> list[float]:
        return [time / rate for time in self.arrivals]


@dataclass(frozen=True, slots=True)
class Spec:
    """How a workload is drawn. Means are those before the bounds."""

    requests: int
    prompt: int
    output: int
    cap: int  # max_tokens of every request
    trace: Path | None
    seed: int


def make_workload(spec: Spec) -> Workload:
    """Raises ConfigError for a trace that cannot be read or is too short."""
    rng = random.Random(spec.seed)
    sizes = lengths(rng, spec.prompt, 4 * spec.prompt, spec.requests)
    top = SHAPE["vocab_size"]
    prompts = [[rng.randrange(FIRST_ID, top) for _ in range(size)] for size in sizes]
    wanted = lengths(rng, spec.output, spec.cap - SLACK_TOKENS, spec.requests)
    return Workload(prompts, wanted, _arrivals(spec, rng), spec.cap)


def _arrivals(spec: Spec, rng: random.Random) -> list[float]:
    """From 0, ascending, one per second in the mean."""
    if spec.trace is None:
        times = arrival_times("gamma", 1.0, spec.requests, rng, cv=AZURE_CV)
    else:
        rows = read_trace(spec.trace)[: spec.requests]
        if len(rows) < spec.requests:
            raise ValueError(f"{spec.trace} holds only {len(rows)} requests")
        times = [row.arrival_s for row in rows]
    return stretched([time - times[0] for time in times], 1.0)


def endless_bodies(work: Workload) -> list[dict[str, Any]]:
    """Requests that say what each prompt continues with."""
    return [
        body(prompt, min(work.max_tokens, end + SLACK_TOKENS))
        for prompt, end in zip(work.prompts, work.wanted, strict=True)
    ]


def expected_of(continuations: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[list[int]]:
    """Each continuation up to its stop token, which comes last."""
    return [
        list(tokens[: stop_index(tokens, end - 1) + 1])
        for tokens, end in zip(continuations, wanted, strict=True)
    ]


def ended_bodies(work: Workload, expected: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """The same prompts, each ended by its stop token, under the same `max_tokens`."""
    return [
        body(prompt, work.max_tokens) | {"stop_token_ids": [tokens[-1]]}
        for prompt, tokens in zip(work.prompts, expected, strict=True)
    ]


def body(prompt: list[int], max_tokens: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


def same_share(tokens: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> float:
    """Share of the answers that are equal to the last token."""
    return sum(list(a) == list(b) for a, b in zip(tokens, expected, strict=True)) / len(expected)
