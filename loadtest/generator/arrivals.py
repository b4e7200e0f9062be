"""When requests come: seconds since the start, ascending, the first at its own gap. Knows no lengths.

poisson    exponential gaps: what independent users make
gamma      gaps of mean 1/rate and coefficient of variation cv (1: poisson; Azure's traces lie near 2)
constant   equal gaps
bursts     `size` at once, the groups poisson at rate / size
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import accumulate


def arrival_times(
    kind: str, rate: float, count: int, rng: random.Random, cv: float = 1.0, size: int = 8
) -> list[float]:
    """`count` times with a mean of `rate` per second; all 0 at an infinite rate."""
    assert rate > 0.0
    if math.isinf(rate):
        return [0.0] * count
    if kind == "constant":
        return [i / rate for i in range(count)]
    if kind == "bursts":
        groups = list(accumulate(rng.expovariate(rate / size) for _ in range(-(-count // size))))
        return [groups[i // size] for i in range(count)]
    if kind == "gamma":
        shape = 1.0 / (cv * cv)
        return list(accumulate(rng.gammavariate(shape, 1.0 / (rate * shape)) for _ in range(count)))
    assert kind == "poisson", kind
    return list(accumulate(rng.expovariate(rate) for _ in range(count)))


def stretched(times: Sequence[float], rate: float | None) -> list[float]:
    """A trace's own times, or the same rhythm at `rate` per second in the mean."""
    if rate is None or not times:
        return list(times)
    if math.isinf(rate):
        return [0.0] * len(times)
    factor = len(times) / rate / max(times[-1], 1e-9)
    return [time * factor for time in times]
