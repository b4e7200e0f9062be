"""Whether to leave part of every running request uncached and recompute it in each step, and how much.

With N tokens of KV memory and requests of s tokens, a ratio r lets b = N / (s (1 - r)) run instead of N / s,
at the price of r s b tokens recomputed in every step. Where the step is linear in what it does,

    b / T = (N / s) / ((1 - r) T0 + r N C_rec)

so more than none pays only if N C_rec < T0, whatever r and s are: C_rec the seconds to recompute a token, T0
a step with the memory full. With a link beside it that loads other tokens meanwhile: N < T0 (1/C_rec +
1/C_link). A step that is short of rows has some recompute for free, which the cost model knows and the
formula does not: so what the formula allows is measured by the cost model over a grid of r.
"""

from __future__ import annotations

from collections.abc import Callable

GRID = tuple(0.05 * i for i in range(13))  # 0 ... 0.6

_MIN_GAIN = 1.02  # a ratio above 0 must beat 0 by this: the cost model errs by about as much
_MAX_CHANGE = 0.05  # of r, from plan to plan

RecomputeStepTime = Callable[
    [float, float, float], float
]  # (decode rows, recompute rows, KV tokens) -> seconds


def may_pay(num_tokens: int, full_step_s: float, recompute_s: float, link_s: float | None = None) -> bool:
    """N < T0 (1/C_rec + 1/C_link): `num_tokens` of KV memory, `full_step_s` a step with the memory full, the
    others seconds per token; `link_s` None: there is no host tier."""
    rate = 1.0 / recompute_s + (1.0 / link_s if link_s else 0.0)
    return num_tokens < full_step_s * rate


def output_rate(
    ratio: float,
    *,
    num_tokens: int,
    mean_tokens: float,
    num_wanted: int,
    step_time: RecomputeStepTime,
    limit_s: float | None,
) -> float:
    """Tokens per second at `ratio`, with `num_wanted` requests of `mean_tokens` each that want to run; 0
    where a step would take longer than `limit_s`."""
    count = min(float(num_wanted), num_tokens / (mean_tokens * (1.0 - ratio)))
    context = count * mean_tokens
    seconds = step_time(count, ratio * context, context)
    if seconds <= 0.0 or (limit_s is not None and seconds > limit_s):
        return 0.0
    return count / seconds


def best_ratio(rate: Callable[[float], float], grid: tuple[float, ...] = GRID) -> float:
    """The ratio of the highest `rate`, 0 unless another is better by 2 %."""
    none = rate(0.0)
    best = max(grid, key=rate)
    return best if rate(best) > _MIN_GAIN * none else 0.0


def step_towards(ratio: float, target: float) -> float:
    """The next ratio on the way from `ratio` to `target`: at most 0.05 away, so that no plan turns the memory
    over at once."""
    return max(ratio - _MAX_CHANGE, min(ratio + _MAX_CHANGE, target))
