"""Rows that a step takes along at next to no cost: it reads the weights anyway."""

from __future__ import annotations

from collections.abc import Callable

WITHIN = 16  # rows: nobody asks for more precision
_TOLERANCE = 1.03  # rows are spare as long as the step takes no longer than this times itself without them


def spare_rows(step_s: Callable[[int], float], least: int, most: int, allowed_s: float = 0.0) -> int:
    """The most rows beyond a step's own that are spare, to within 16; at least `least`, which prompts need in
    any case so as to get on, and at most `most`. `step_s` takes the further rows. Where a step may take
    `allowed_s`, all that it can take by then."""
    if most <= least:
        return max(0, most)
    limit_s = max(allowed_s, _TOLERANCE * step_s(0))
    low, high = least, max(2 * least, WITHIN)
    while high <= most and step_s(high) <= limit_s:
        low, high = high, 2 * high
    high = min(high, most)
    if step_s(high) <= limit_s:
        return high
    while high - low > WITHIN:
        middle = (low + high) // 2
        if step_s(middle) <= limit_s:
            low = middle
        else:
            high = middle
    return low
