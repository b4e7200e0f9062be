"""A day's arrivals, squeezed into less: a rate that follows the hours, and bursts on top of it.

The curve is chosen, not measured: what people do by day and at night, with a trough of a fifth of the peak
at four in the morning, a peak before noon, a dip at lunch and a second peak in the afternoon. Arrivals are a
gamma process in operational time: gaps of mean 1 and coefficient of variation `cv` (1.7: that of the Azure
conversation trace) are laid along the integral of the rate, so bursts stay bursts at every hour. Squeezing a
day by k makes every rise k times as steep as it is in life: harder for whoever scales, not easier.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ellm.loadtest.sim.traces import read_trace
from ellm.loadtest.sim.workload import SimRequest
from ellm.worker.api.errors import ConfigError

HOURS = (  # rate at the full hours, as a share of the peak; the day closes on itself
    *(0.40, 0.31, 0.25, 0.21, 0.20, 0.22, 0.30, 0.45, 0.66, 0.85, 0.96, 1.00),
    *(0.93, 0.86, 0.92, 0.98, 0.97, 0.90, 0.80, 0.74, 0.72, 0.68, 0.60, 0.50),
)
MEAN_SHARE = sum(HOURS) / len(HOURS)  # of a curve of straight lines that closes on itself

Floats = NDArray[np.float64]


def share_at(hour: float) -> float:
    """The rate at an hour of the day, as a share of the peak; straight lines between full hours."""
    return float(np.interp(hour % 24.0, np.arange(25), [*HOURS, HOURS[0]]))


def day_arrivals(duration_s: float, peak_rate: float, cv: float, seed: int) -> list[float]:
    """When requests come in `duration_s` seconds that hold a day from midnight to midnight. `peak_rate` per
    second; `cv` above 0."""
    if min(duration_s, peak_rate, cv) <= 0.0:
        raise ConfigError("a day needs a duration, a peak rate and a cv above 0")
    edges = np.linspace(0.0, duration_s, 24 * 60 + 1)
    rates = peak_rate * np.array([share_at(24.0 * edge / duration_s) for edge in edges])
    expected = np.concatenate(([0.0], np.cumsum((rates[1:] + rates[:-1]) / 2 * np.diff(edges))))
    rng = np.random.default_rng([seed, 2])
    shape = 1.0 / (cv * cv)
    most = int(expected[-1] + 12.0 * cv * expected[-1] ** 0.5) + 64
    along = np.cumsum(rng.gamma(shape, 1.0 / shape, most))
    assert along[-1] > expected[-1], "too few gaps were drawn"
    times: list[float] = np.interp(along[along < expected[-1]], expected, edges).tolist()
    return times


def day_requests(
    trace: Path, arrivals: Sequence[float], room: int, seed: int
) -> tuple[list[SimRequest], int]:
    """One request for each arrival, with lengths drawn from a trace's rows that fit into `room` tokens, and
    how many rows do not. Rows are drawn whole: an answer keeps the length that its prompt had."""
    rows = read_trace(trace)
    fitting = [row for row in rows if row.prompt_tokens + row.output_tokens <= room]
    if not fitting:
        raise ConfigError(f"{trace}: no request fits into a pool of {room} tokens")
    longest = max(row.output_tokens for row in fitting)
    drawn = np.random.default_rng([seed, 3]).integers(0, len(fitting), len(arrivals))
    requests = []
    for at, place in zip(arrivals, drawn.tolist(), strict=True):
        row = fitting[place]
        most = min(longest, room - row.prompt_tokens)
        requests.append(SimRequest(at, row.prompt_tokens, row.output_tokens, most))
    return requests, len(rows) - len(fitting)
