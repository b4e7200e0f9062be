"""Who should be resident: the order in which sequences get a share of the pool.

    urgent    no token yet, or little slack: least slack first; who is resident has a second's advantage
    resident  ahead of their deadlines and resident: least slack first, and those that are costly to pause
    ahead     ahead and parked: nobody is brought back before its slack nears the guard, for each swap costs
    hopeless  late even at full speed: what is left over, and a turn of 5 s for each that has waited 30 s

Better priorities go first within each class but the last. It does not know blocks or how they move.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from ellm.worker.engine.planner.slack import GUARD_S

PATIENCE_S, TURN_S = 30.0, 5.0  # of the hopeless: nobody waits for ever
_ADVANTAGE_S = 1.0  # of a resident among the urgent


class Rank(IntEnum):
    URGENT = 0
    RESIDENT = 1
    AHEAD = 2
    HOPELESS = 3


@dataclass(frozen=True, slots=True)
class Standing:
    """One sequence as the ranking sees it. `slack_s` None: it has no deadline, and goes by `order`."""

    index: int  # the caller's
    priority: int
    order: int
    resident: bool
    started: bool  # it has put out a token
    hopeless: bool
    slack_s: float | None
    num_blocks: int  # that it would hold
    since_s: float = 0.0  # how long it has been resident, or parked
    saved: float = 1.0  # share of it that the host has, so that pausing it costs nothing; 1 without a host


def rank(standing: Standing) -> Rank:
    if standing.hopeless:
        turn = standing.since_s < TURN_S if standing.resident else standing.since_s > PATIENCE_S
        return Rank.URGENT if turn else Rank.HOPELESS
    if not standing.started or (standing.slack_s is not None and standing.slack_s < GUARD_S):
        return Rank.URGENT
    # One without a deadline is never ahead of it: parked or not, it keeps its place in the order of arrival.
    return Rank.RESIDENT if standing.resident or standing.slack_s is None else Rank.AHEAD


def by_arrival(standings: Iterable[Standing]) -> list[tuple[Rank, Standing]]:
    """First who came first: who must give way has the least to compute again, and nobody takes turns."""
    return sorted(((rank(s), s) for s in standings), key=lambda pair: (pair[1].priority, pair[1].order))


def in_order(standings: Iterable[Standing]) -> list[tuple[Rank, Standing]]:
    """First who should be resident first."""

    def key(pair: tuple[Rank, Standing]) -> tuple[float, ...]:
        which, s = pair
        if s.slack_s is None:
            return (which, s.priority, 0.0 if s.started else -GUARD_S, s.order)
        slack_s = s.slack_s
        if which is Rank.URGENT and s.resident:
            slack_s -= _ADVANTAGE_S
        if which is Rank.RESIDENT:
            slack_s *= s.saved
        if which is Rank.HOPELESS:
            return (which, not s.resident, slack_s, s.order)
        return (which, s.priority, slack_s, s.order)

    return sorted(((rank(s), s) for s in standings), key=key)


def residents(
    order: Iterable[tuple[Rank, Standing]], num_blocks: int, num_seqs: int, *, in_turn: bool = False
) -> list[Standing]:
    """As many of `order` as fit in `num_blocks`, at most `num_seqs`. One that does not fit is passed over,
    or, `in_turn`, ends it: were one behind it let in, it would take the room that the one before waits for,
    and give way again for it. Then the first stays in any case."""
    chosen: list[Standing] = []
    for _, standing in order:
        fits = standing.num_blocks <= num_blocks and len(chosen) < num_seqs
        if fits or (in_turn and not chosen):
            chosen.append(standing)
            num_blocks -= standing.num_blocks
        elif in_turn:
            break
    return chosen
