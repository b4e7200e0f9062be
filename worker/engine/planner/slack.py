"""How far a request is ahead of its deadline, and what share of the steps it needs to stay there.

A request with `per_token_s` seconds for each output token owes its n-th token n * per_token_s after its
first. One that is ahead of that may pause; the share of steps in which it must take part is its duty.
Planning aims at 0.97 of the SLO, so that what a plan misses by a little is not late.

None stands for a request without an SLO: it is never ahead, never hopeless, and takes part in every step.
"""

from __future__ import annotations

from collections.abc import Iterable

AIM = 0.97  # of the SLO
GUARD_S = 1.0  # slack below this is not for spending

# A request that pauses costs more than the steps it takes part in: copies, restores, memory that is held and
# not used meanwhile. Counted as a tenth: without it a backlog at SLO / T = 1.1 collapsed with a host tier
# (attainment 0.72), with it every request was on time.
PAUSING = 1.1

# Share of the slack beyond the guard that duty counts on. All of it where a step at full memory leaves so
# much of the SLO that what was spent can be caught up, and where a pause costs a copy, not a computation.
_SPENT_LEAST, _SPENT_MOST = 0.25, 1.0
_TIGHT, _LOOSE = 1.6, 2.0  # the SLO in such steps: between them the share rises
_SMOOTHING = 0.05  # of a new step in the moving averages
_MIN_SHARE = 0.1  # a moment in which hardly anyone decodes says little of those to come


def seconds_per_token(slo_s: float | None) -> float | None:
    """What planning allows a request with this SLO for each output token."""
    return None if slo_s is None else AIM * slo_s


def slack(first_token_at: float, per_token_s: float, num_output: int, now: float) -> float:
    """Seconds until the next token is due, of a request that has put out `num_output`; negative: overdue."""
    return first_token_at + per_token_s * num_output - now


def is_hopeless(slack_s: float, num_remaining: float, per_token_s: float, step_s: float) -> bool:
    """Whether it would be late at its end even with a token from each of its `num_remaining` next steps."""
    return slack_s + num_remaining * (per_token_s - step_s) < 0.0


def spent_share(per_token_s: float, full_step_s: float, has_host: bool) -> float:
    """Of a request's slack beyond the guard, how much duty counts on; `has_host`: there is a host tier."""
    if not has_host or full_step_s <= 0.0:
        return _SPENT_LEAST
    loose = (per_token_s / full_step_s - _TIGHT) / (_LOOSE - _TIGHT)
    return _SPENT_LEAST + (_SPENT_MOST - _SPENT_LEAST) * min(1.0, max(0.0, loose))


def duty(
    slack_s: float,
    num_remaining: float,
    per_token_s: float | None,
    full_step_s: float,
    has_host: bool = False,
) -> float:
    """Share of steps, in (0, 1], that a request needs so as to use up no more than `spent_share` of the slack
    it has beyond the guard. `full_step_s` is FullSpeed's. A new request has no slack."""
    if per_token_s is None:
        return 1.0
    num_remaining = max(1.0, num_remaining)
    spent = spent_share(per_token_s, full_step_s, has_host)
    time = per_token_s * num_remaining + spent * max(0.0, slack_s - GUARD_S)
    return min(1.0, PAUSING * num_remaining * full_step_s / time)


def mean_pause(num_tokens: Iterable[int], slacks: Iterable[float | None]) -> float:
    """Seconds that a token's owner could pause for, on average: its slack beyond the guard."""
    held, seconds = 0, 0.0
    for n, slack_s in zip(num_tokens, slacks, strict=True):
        held += n
        if slack_s is not None and slack_s > GUARD_S:
            seconds += n * (slack_s - GUARD_S)
    return seconds / held if held else 0.0


class FullSpeed:
    """Seconds per token of a request that pauses in no step, while the memory is full: steps take longer than
    a request's own share of them where some residents do not decode (they are being filled or restored)."""

    def __init__(self) -> None:
        self._step_s = 0.0
        self._share = 1.0
        self._seen = False

    def observe(self, step_s: float, num_decode: int, num_residents: int) -> None:
        """A step took `step_s`; `num_decode` of the residents got a token from it."""
        if num_residents <= 0:
            return
        weight = _SMOOTHING if self._seen else 1.0
        self._seen = True
        self._step_s += weight * (step_s - self._step_s)
        self._share += _SMOOTHING * (num_decode / num_residents - self._share)

    @property
    def step_s(self) -> float:
        """Moving average of measured steps; 0 before the first."""
        return self._step_s

    def seconds(self, model_s: float) -> float:
        """`model_s` is the predicted step at full memory; what was measured counts where it is longer."""
        return max(model_s, self._step_s) / max(_MIN_SHARE, min(1.0, self._share))
