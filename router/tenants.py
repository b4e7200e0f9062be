"""Rates of API keys at one router: a bucket each for requests and tokens, filled from what it is lent.

A bucket holds one second's worth at most. A request is let in while both are above zero and then pays for all
its sequences: as many requests, its prompts, and all the output that it may have (`max_tokens` of each), of
which what it did not use is given back when it ends. So no number of requests at once can owe more than was
counted. A bucket may go below zero and is waited for, which lets a prompt in that is larger than a second's
worth and still keeps the rate. What is lent comes from the controller; without it, limit / N. Time is an
argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ellm.cluster.api.guidance import TenantBudget
from ellm.cluster.api.view import TenantUse
from ellm.router.errors import RateLimited
from ellm.router.keys import ApiKey

IDLE_S = 120.0  # after which a key's buckets are forgotten, if they owe nothing
_DEMAND_S = 2.0  # time constant of what is asked for
_MAX_WAIT_S = 60.0  # shares change every second


class Bucket:
    """Of one second's worth, or of one request where that is more."""

    __slots__ = ("_at", "level")

    def __init__(self, now: float) -> None:
        self.level: float | None = None  # full
        self._at = now

    def fill(self, rate: float, now: float) -> float:
        """Level after the time since the last call, at `rate` per second."""
        most = max(1.0, rate)
        level = most if self.level is None else self.level
        self.level = min(most, level + rate * max(0.0, now - self._at))
        self._at = now
        return self.level

    def take(self, amount: float) -> None:
        assert self.level is not None
        self.level -= amount

    def wait_s(self, rate: float, needed: float) -> float:
        """Until the level is `needed`."""
        assert self.level is not None
        return min(_MAX_WAIT_S, (needed - self.level) / rate) if rate > 0.0 else _MAX_WAIT_S


@dataclass(slots=True)
class _Tenant:
    key: ApiKey
    requests: Bucket
    tokens: Bucket
    used_at: float
    asked: list[float] = field(default_factory=lambda: [0.0, 0.0])  # requests, tokens since the last note
    rates: list[float] = field(default_factory=lambda: [0.0, 0.0])  # of them, per second


class TenantLimits:
    """One per router."""

    def __init__(self, budget: Callable[[str], TenantBudget | None], num_routers: Callable[[], int]) -> None:
        """`budget`: what the controller lends this router for a key, None where it says nothing."""
        self._budget = budget
        self._num_routers = num_routers
        self._tenants: dict[str, _Tenant] = {}
        self._noted_at: float | None = None

    def enter(self, key: ApiKey, now: float) -> None:
        """Let one request in, or raise RateLimited with the time after which it may come again."""
        if key.requests_per_s is None and key.tokens_per_min is None:
            return
        tenant = self._tenant(key, now)
        tenant.asked[0] += 1.0
        requests_per_s, tokens_per_s = self._lent(key)
        wait_s = 0.0
        if requests_per_s is not None and tenant.requests.fill(requests_per_s, now) < 1.0:
            wait_s = tenant.requests.wait_s(requests_per_s, 1.0)
        if tokens_per_s is not None and tenant.tokens.fill(tokens_per_s, now) <= 0.0:
            wait_s = max(wait_s, tenant.tokens.wait_s(tokens_per_s, 1.0))
        if wait_s > 0.0:
            raise RateLimited("this API key's rate is used up", retry_after_s=wait_s)
        if requests_per_s is not None:
            tenant.requests.take(1.0)

    def reserve(self, key: ApiKey, sequences: int, prompt: int, output: int, now: float) -> None:
        """What a request that was let in as one turned out to be: its sequences, its prompts' tokens, and
        those of the output that it may have."""
        if key.requests_per_s is not None and sequences > 1:
            tenant = self._tenant(key, now)
            tenant.asked[0] += sequences - 1
            requests_per_s = self._lent(key)[0]
            if requests_per_s is not None:
                tenant.requests.fill(requests_per_s, now)
                tenant.requests.take(sequences - 1)
        self._take(key, prompt, prompt + output, now)

    def settle(self, key: ApiKey, reserved: int, used: int, now: float) -> None:
        """It has ended: of the output that was reserved it has used so much."""
        self._take(key, used, used - reserved, now)

    def _take(self, key: ApiKey, asked: int, tokens: int, now: float) -> None:
        if key.tokens_per_min is None:
            return
        tenant = self._tenant(key, now)
        tenant.asked[1] += asked
        tokens_per_s = self._lent(key)[1]
        if tokens_per_s is not None:
            tenant.tokens.fill(tokens_per_s, now)
            tenant.tokens.take(tokens)

    def uses(self, now: float) -> tuple[TenantUse, ...]:
        """What is asked for per second, for the router's note to the controller."""
        elapsed_s = 0.0 if self._noted_at is None else max(0.0, now - self._noted_at)
        self._noted_at = now
        weight = 1.0 - math.exp(-elapsed_s / _DEMAND_S)
        for ident, tenant in list(self._tenants.items()):
            if elapsed_s > 0.0:
                for i in (0, 1):
                    tenant.rates[i] += weight * (tenant.asked[i] / elapsed_s - tenant.rates[i])
                    tenant.asked[i] = 0.0
            if now - tenant.used_at > IDLE_S and (tenant.tokens.level or 0.0) >= 0.0:
                del self._tenants[ident]
        return tuple(
            TenantUse(ident, t.key.requests_per_s, _per_s(t.key.tokens_per_min), *t.rates)
            for ident, t in self._tenants.items()
        )

    def _lent(self, key: ApiKey) -> tuple[float | None, float | None]:
        """Requests and tokens per second; None: no limit."""
        budget = self._budget(key.id)
        limits = key.requests_per_s, _per_s(key.tokens_per_min)
        if budget is None:
            share = 1.0 / max(1, self._num_routers())
            return _times(limits[0], share), _times(limits[1], share)
        # A limit that the controller has not heard of yet, or one that is gone: the key's own word counts.
        return _at_most(limits[0], budget.requests), _at_most(limits[1], budget.tokens)

    def _tenant(self, key: ApiKey, now: float) -> _Tenant:
        tenant = self._tenants.get(key.id)
        if tenant is None:
            tenant = self._tenants[key.id] = _Tenant(key, Bucket(now), Bucket(now), now)
        tenant.key, tenant.used_at = key, now
        return tenant


def _per_s(per_min: float | None) -> float | None:
    return None if per_min is None else per_min / 60.0


def _times(limit: float | None, share: float) -> float | None:
    return None if limit is None else limit * share


def _at_most(limit: float | None, lent: float) -> float | None:
    if limit is None:
        return None
    return limit if lent < 0.0 else min(limit, lent)
