"""Which workers may be chosen at all, for every policy alike; and the words for why a choice fell back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ellm.router.policies.replica import Replica

MAX_AGE_S = 2.0  # a report older than this says nothing of load
STALE = "stale"  # no worker has a report that is young enough
SPENT = "spent"  # no worker with a weight is left any budget
UNWEIGHTED = "unweighted"  # the controller wants none of them to get anything
FALLBACKS = (STALE, SPENT, UNWEIGHTED)


@dataclass(frozen=True, slots=True)
class Candidates:
    replicas: Sequence[Replica]
    fallback: str | None = None  # why loads or advice cannot be gone by


def candidates(replicas: Sequence[Replica], now: float) -> Candidates:
    """Never one that drains, loads or has failed. Of the others those with a young report, a weight and a
    budget. Where none has them, budgets are overlooked first, which hold for a second; weights last, for a
    worker of weight 0 is one that the controller distrusts."""
    since = now - MAX_AGE_S  # a report from the future (a clock that jumped) is young
    best = [r for r in replicas if r.ready and r.reported_at >= since and r.weight > 0.0 < r.admit_tokens]
    if best:
        return Candidates(best)
    ready = [r for r in replicas if r.ready]
    fresh = [r for r in ready if r.reported_at >= since]
    if not fresh:
        return Candidates([r for r in ready if r.weight > 0.0] or ready, STALE)
    weighted = [r for r in fresh if r.weight > 0.0]
    return Candidates(weighted, SPENT) if weighted else Candidates(fresh, UNWEIGHTED)
