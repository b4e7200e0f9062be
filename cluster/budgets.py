"""Lends each API key's rate to routers, a second at a time. Pure.

A key's limit holds over the whole cluster, and requests are admitted by routers that ask nobody. So each
gets a share of the limit by what its clients asked for of late: max-min fair (nobody gets more than it asked
while another gets less than an even share; a tenth of that always), and what nobody asked for is spread
evenly, for clients that come anew. The shares of all routers add up to the limit. A router that hears nothing
falls back to limit / N.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ellm.cluster.api.guidance import TenantBudget
from ellm.cluster.api.view import RouterNote, TenantUse

ALWAYS = 0.1  # of an even share: the first client that comes to a router is not turned away


def lend(notes: Sequence[RouterNote]) -> dict[str, tuple[TenantBudget, ...]]:
    """Router id -> what it may spend per second for each key that has a limit and was used anywhere.
    O(routers * keys), and a sort of the routers for each key that asks for more than it may have."""
    uses: dict[str, list[tuple[int, TenantUse]]] = {}  # tenant -> (place of the router, its use)
    for place, note in enumerate(notes):
        for use in note.uses:
            if use.max_requests_per_s is not None or use.max_tokens_per_s is not None:
                uses.setdefault(use.tenant, []).append((place, use))
    lent: list[list[TenantBudget]] = [[] for _ in notes]
    for tenant, placed in sorted(uses.items()):
        requests, tokens = [0.0] * len(notes), [0.0] * len(notes)
        for place, use in placed:
            requests[place], tokens[place] = use.requests_per_s, use.tokens_per_s
        # A key whose limits were just changed is seen differently by routers: the tighter one holds.
        by_request = shares(_least(use.max_requests_per_s for _, use in placed), requests)
        by_token = shares(_least(use.max_tokens_per_s for _, use in placed), tokens)
        for budgets, request_share, token_share in zip(lent, by_request, by_token, strict=True):
            budgets.append(TenantBudget(tenant, request_share, token_share))
    return {note.router_id: tuple(budgets) for note, budgets in zip(notes, lent, strict=True)}


def shares(limit: float | None, demands: Sequence[float]) -> list[float]:
    """Max-min fair shares of `limit`, the rest spread evenly; -1 for each where there is no limit."""
    if limit is None:
        return [-1.0] * len(demands)
    left = max(0.0, limit)
    least = left * ALWAYS / len(demands)
    given = [demand if demand > least else least for demand in demands]
    spare = left - sum(given)
    if spare < 0.0:  # not everyone can have what it asks for: fill up from the modest to the greedy
        order = sorted(range(len(given)), key=given.__getitem__)
        for index, place in enumerate(order):
            given[place] = min(given[place], left / (len(order) - index))
            left -= given[place]
        return given
    return [share + spare / len(given) for share in given]


def _least(limits: Iterable[float | None]) -> float | None:
    return min((limit for limit in limits if limit is not None), default=None)
