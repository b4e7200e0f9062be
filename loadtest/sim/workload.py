"""Which requests come, and when: lengths by their means or from a trace, arrivals by a rate and a cv.

Lengths are lognormal (sigma 0.8, as in conversations) with a cap; gaps between arrivals are gamma with a
given coefficient of variation (1.7: that of the Azure conversation trace; 1: Poisson). Lengths and arrivals
follow from the seed, and lengths do not depend on the rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ellm.loadtest.sim.traces import read_trace
from ellm.worker.api.errors import ConfigError

SIGMA = 0.8
MAX_TOKENS = 4_000  # what clients ask for, whatever comes
_FIRST_ID = 2  # of prompts; 0 ends a text, 1 is what the model says


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One request. `output_tokens` is known to the executor alone; the engine sees `max_tokens`."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    hash_ids: tuple[int, ...] = ()  # of the prompt's stretches, equal where the content is
    stretch: int = 0  # tokens of each

    def prompt_ids(self, index: int) -> tuple[int, ...]:
        """Cheap to make: one id over and over, which no other request has, but for shared stretches."""
        if not self.hash_ids:
            return (_FIRST_ID + index,) * self.prompt_tokens
        ids = [_FIRST_ID + hash_id for hash_id in self.hash_ids for _ in range(self.stretch)]
        ids += [ids[-1]] * (self.prompt_tokens - len(ids))
        return tuple(ids[: self.prompt_tokens])


@dataclass(frozen=True, slots=True)
class Lengths:
    """Means are those of the lognormal distribution before the cap."""

    prompt_mean: float
    output_mean: float
    prompt_cap: int
    output_cap: int


LENGTHS = {
    "sharegpt": Lengths(222, 1_346, 4_000, MAX_TOKENS),
    "leval": Lengths(35_956, 5_189, 128_000, 16_000),
}


def make_requests(workload: str, count: int, seed: int, capacity_tokens: int) -> tuple[list[SimRequest], int]:
    """`count` requests of a named distribution or of a trace file, with room for each in `capacity_tokens`,
    and how many of a trace were left out because they have none. Named ones have no arrivals yet (all 0); a
    trace has its own, and the seed says where in it to start.

    Raises ConfigError for a name that is neither.
    """
    lengths = LENGTHS.get(workload)
    if lengths is not None:
        return _draw(lengths, count, seed, capacity_tokens), 0
    path = Path(workload)
    if not path.is_file():
        known = ", ".join(LENGTHS)
        raise ConfigError(f"workload {workload!r} is neither a file nor one of: {known}", param="workload")
    return _from_trace(path, count, seed, capacity_tokens)


def with_arrivals(requests: Sequence[SimRequest], rate: float, cv: float, seed: int) -> list[SimRequest]:
    """The same requests at `rate` per second; gaps have coefficient of variation `cv` (0: all equal)."""
    rng = np.random.default_rng([seed, 1])
    shape = 1.0 / (cv * cv) if cv > 0.0 else 0.0
    gaps = rng.gamma(shape, 1.0 / (rate * shape), len(requests)) if shape else [1.0 / rate] * len(requests)
    times = np.cumsum(gaps).tolist()
    return [replace(request, arrival_s=time) for request, time in zip(requests, times, strict=True)]


def at_rate(requests: Sequence[SimRequest], rate: float) -> list[SimRequest]:
    """The same requests with their own arrivals, stretched so that `rate` per second come in the mean."""
    factor = len(requests) / (rate * max(requests[-1].arrival_s, 1e-9))
    return [replace(request, arrival_s=factor * request.arrival_s) for request in requests]


def _draw(lengths: Lengths, count: int, seed: int, capacity_tokens: int) -> list[SimRequest]:
    rng = np.random.default_rng([seed, 0])
    # The longest prompt leaves room for the longest output, or for half the pool where that is little.
    room = max(capacity_tokens // 2, capacity_tokens - lengths.output_cap)
    prompts = _lognormal(rng, lengths.prompt_mean, min(lengths.prompt_cap, room), count)
    outputs = _lognormal(rng, lengths.output_mean, lengths.output_cap, count)
    requests = []
    for prompt, output in zip(prompts, outputs, strict=True):
        most = min(lengths.output_cap, capacity_tokens - prompt)
        requests.append(SimRequest(0.0, prompt, min(output, most), most))
    return requests


def _lognormal(rng: np.random.Generator, mean: float, cap: int, count: int) -> list[int]:
    values = rng.lognormal(np.log(mean) - 0.5 * SIGMA * SIGMA, SIGMA, count)
    whole: list[int] = np.clip(np.rint(values), 1, cap).astype(int).tolist()
    return whole


def _from_trace(path: Path, count: int, seed: int, capacity_tokens: int) -> tuple[list[SimRequest], int]:
    rows = read_trace(path)
    start = seed * count % max(1, len(rows) - count + 1)
    most = max(MAX_TOKENS, max(row.output_tokens for row in rows))
    requests, left_out = [], 0
    chosen = rows[start : start + count]
    begin = chosen[0].arrival_s
    for row in chosen:
        room = capacity_tokens - row.prompt_tokens
        if room < row.output_tokens:
            left_out += 1
            continue
        request = SimRequest(
            row.arrival_s - begin,
            row.prompt_tokens,
            row.output_tokens,
            min(most, room),
            row.hash_ids,
            row.stretch,
        )
        requests.append(request)
    if not requests:
        raise ConfigError(f"{path}: no request fits into a pool of {capacity_tokens} tokens")
    return requests, left_out
