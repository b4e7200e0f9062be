"""Lends each API key's rate to routers, a second at a time. Pure.

A key's limit holds over the whole cluster, and requests are admitted by routers that ask nobody. So each
gets a share of the limit by what its clients asked for of late: max-min fair (nobody gets more than it asked
while another gets less than an even share; a tenth of that always), and what nobody asked for is spread
evenly, for clients that come anew. The shares of all routers add up to the limit. A router that hears nothing
falls back to limit / N.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ellm.cluster.api.guidance import TenantBudget
from ellm.cluster.api.view import RouterNote, TenantUse

ALWAYS = 0.1  # of an even share: the first client that comes to a router is not turned away


def lend(notes: Sequence[RouterNote]) -> dict[str, tuple[TenantBudget, ...]]:
    """Router id -> what it may spend per second for each key that has a limit and was used anywhere."""
    uses: dict[str, dict[str, TenantUse]] = {}  # tenant -> router id -> its use
    for note in notes:
        for use in note.uses:
            if use.max_requests_per_s is not None or use.max_tokens_per_s is not None:
                uses.setdefault(use.tenant, {})[note.router_id] = use
    lent: dict[str, list[TenantBudget]] = {note.router_id: [] for note in notes}
    for tenant, by_router in sorted(uses.items()):
        requests = {
            router: by_router[router].requests_per_s if router in by_router else 0.0 for router in lent
        }
        tokens = {router: by_router[router].tokens_per_s if router in by_router else 0.0 for router in lent}
        # A key whose limits were just changed is seen differently by routers: the tighter one holds.
        max_requests = _least(use.max_requests_per_s for use in by_router.values())
        max_tokens = _least(use.max_tokens_per_s for use in by_router.values())
        by_request, by_token = shares(max_requests, requests), shares(max_tokens, tokens)
        for router in lent:
            lent[router].append(TenantBudget(tenant, by_request[router], by_token[router]))
    return {router: tuple(budgets) for router, budgets in lent.items()}


def shares(limit: float | None, demands: Mapping[str, float]) -> dict[str, float]:
    """Max-min fair shares of `limit`, the rest spread evenly; -1 for each where there is no limit."""
    if limit is None:
        return dict.fromkeys(demands, -1.0)
    left, given = max(0.0, limit), {}
    least = left * ALWAYS / len(demands)
    waiting = sorted(demands, key=lambda router: (demands[router], router))
    for index, router in enumerate(waiting):
        given[router] = min(max(least, demands[router]), left / (len(waiting) - index))
        left -= given[router]
    return {router: given[router] + left / len(demands) for router in demands}


def _least(limits: Iterable[float | None]) -> float | None:
    return min((limit for limit in limits if limit is not None), default=None)
