"""The same workload at several rates; the highest rate that keeps a share of promises: DistServe's goodput.

Knows rates and attainments alone; `measure` runs one rate and gives its result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ellm.worker.api.errors import ConfigError

Measure = Callable[[float], dict[str, Any]]
PRECISION = 1.05  # a search ends when the bounds are this near
MAX_RUNS = 24
LOWEST_RATE = 1e-3


def parse_sweep(text: str) -> list[float]:
    """`rate=1:10` (steps of 1), `rate=1:10:0.5`, `rate=1,2,4,8`. Raises ConfigError."""
    name, _, rest = text.partition("=")
    try:
        if name != "rate":
            raise ValueError
        if "," in rest:
            rates = [float(word) for word in rest.split(",")]
        else:
            bounds = [float(word) for word in rest.split(":")]
            low, high, step = (*bounds, bounds[0], 1.0)[:3] if len(bounds) == 1 else (*bounds, 1.0)[:3]
            if step <= 0.0 or high < low or len(bounds) > 3:
                raise ValueError
            rates = [low + i * step for i in range(int((high - low) / step + 1e-9) + 1)]
    except ValueError:
        raise ConfigError(f"--sweep {text!r} is not rate=LOW:HIGH[:STEP] or rate=R,R,...") from None
    if min(rates) <= 0.0:
        raise ConfigError("--sweep: rates must be above 0")
    return rates


def parse_shares(text: str) -> list[float]:
    """`90,95,99` as shares. Raises ConfigError."""
    try:
        shares = [float(word) / 100.0 for word in text.split(",")]
    except ValueError:
        shares = [0.0]
    if not all(0.0 < share <= 1.0 for share in shares):
        raise ConfigError(f"--search {text!r}: percentages with commas between them, such as 90,95,99")
    return sorted(set(shares))


@dataclass(slots=True)
class Search:
    """What was found: for each share the highest rate seen to keep it, and the lowest seen not to."""

    rates: dict[float, float | None] = field(default_factory=dict)
    not_above: dict[float, float | None] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)


def search(start: float, shares: Sequence[float], measure: Measure) -> Search:
    """Double or halve from `start` until the bounds are known, then halve between them (geometrically).

    One measured rate counts for every share, so three shares cost little more than one. A share that even
    the highest rate tried keeps has `not_above` None; one that no rate keeps has a rate of None.
    """
    found = Search()
    seen: dict[float, float] = {}

    def look(rate: float) -> None:
        result = measure(rate)
        found.runs.append(result)
        seen[rate] = result["summary"]["slo_attainment"]

    look(start)
    for share in sorted(shares, reverse=True):
        while len(found.runs) < MAX_RUNS:
            low, high = bounds(seen, share)
            following = _following(low, high)
            if following is None:
                break
            look(following)
    for share in shares:
        found.rates[share], found.not_above[share] = bounds(seen, share)
    return found


def bounds(seen: dict[float, float], share: float) -> tuple[float | None, float | None]:
    """(highest rate that keeps the share with none below it that does not, lowest that does not)."""
    high = min((rate for rate, attained in seen.items() if attained < share), default=None)
    low = max(
        (r for r, attained in seen.items() if attained >= share and (high is None or r < high)), default=None
    )
    return low, high


def _following(low: float | None, high: float | None) -> float | None:
    """The rate to try next; None when the bounds are near enough."""
    if low is None:
        assert high is not None
        return high / 2.0 if high / 2.0 >= LOWEST_RATE else None
    if high is None:
        return low * 2.0
    return (low * high) ** 0.5 if high > low * PRECISION else None
