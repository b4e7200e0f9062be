"""The default: the worker on which the request is predicted to cost least, waiting and slowing included.

    wait    (rows ahead + own rows that are not cached) / prefill rate + KV to be brought back
            + what is missing of memory and places / the rate at which the running give them up
    cost    (wait + output * step time * (1 + barrier)) / the controller's weight

with everything this router has sent since the report counted in. The barrier rises as the promised memory
nears the pool: there, holes and parking begin to cost every step. Other routers see the same reports and
choose at the same time. How many requests they have sent since is estimated from how fast they send and how
old the report is; those are thought of as filling the cheapest workers up to one level, and the choice is
drawn from what that filling would give each: with new reports it is the cheapest, with old ones it is spread.
Of two draws the cheaper one is taken.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ellm.router.policies.base import Choice, RoutedRequest
from ellm.router.policies.candidates import STALE, candidates
from ellm.router.policies.power_of_two import less_loaded
from ellm.router.policies.prefixes import Prefixes
from ellm.router.policies.replica import Replica

_ROWS_PER_S = 8192.0  # where no worker has told any
_STEP_S = 0.02
_REQUEST_S = 1e-6  # of each sequence: fewer are better where nothing else tells workers apart
_MIN_WEIGHT = 1e-3


@dataclass(frozen=True, slots=True)
class Constants:
    """Frozen on one seed of the simulator and judged on others: docs/routing.md."""

    decode: float = 0.1  # a second of decoding, in seconds of waiting
    knee: float = 0.85  # share of memory promised, from which the barrier rises
    barrier: float = 8.0  # of a step's time, at a full pool; squared in between
    draws: int = 2


class Headroom:
    """`seed` makes its choices reproducible."""

    def __init__(self, seed: int | None = None, constants: Constants = Constants()) -> None:
        self._random = random.Random(seed)
        self._constants = constants

    def choose(self, request: RoutedRequest, replicas: Sequence[Replica], now: float) -> Choice | None:
        there = candidates(replicas, now)
        if not there.replicas:
            return None
        if there.fallback == STALE:
            return Choice(less_loaded(self._random, there.replicas).replica_id, STALE)
        prefixes = Prefixes(request, there.replicas, now)
        costs, slopes = self._costs(request, there.replicas, prefixes.tokens)
        expected = sum(r.foreign_rate * r.stale_s(now) for r in there.replicas)
        chosen = there.replicas[self._draw(costs, slopes, expected)]
        return Choice(chosen.replica_id, there.fallback or "headroom", prefixes.placed(chosen))

    def _costs(
        self, request: RoutedRequest, replicas: Sequence[Replica], cached: dict[str, int]
    ) -> tuple[list[float], list[float]]:
        """Seconds, and how many more each further request like this one would cost."""
        c = self._constants
        output, num = request.output_tokens, request.num_sequences
        prompt = len(request.prompt_ids) * num
        room = prompt + 0.5 * output * num
        fastest = max(r.rows_per_s for r in replicas) or _ROWS_PER_S
        costs, slopes = [], []
        for r in replicas:
            rate = r.rows_per_s or fastest
            own_s = (prompt - cached.get(r.replica_id, 0)) / rate
            wait = (r.queue_rows + r.unseen_rows) / rate + r.queue_s + own_s
            slope = own_s
            step, added = r.step_s(num, room)
            step = step or _STEP_S
            lasts = output * step  # seconds that a request runs
            free = r.free_tokens - r.unseen_tokens - room
            if free < 0.0:
                missing_s = lasts / max(r.running_tokens, 1.0)
                wait -= free * missing_s
                slope += room * missing_s
            places = r.num_requests + num - r.max_running
            if r.max_running and places > 0:
                wait += places * lasts / r.max_running
                slope += num * lasts / r.max_running
            full = (1.0 - free / r.capacity_tokens - c.knee) / (1.0 - c.knee) if r.capacity_tokens else 0.0
            slow = c.barrier * min(full, 1.0) ** 2 if full > 0.0 else 0.0
            weight = max(r.weight, _MIN_WEIGHT)
            decode = c.decode * output * (1.0 + slow)
            costs.append((wait + decode * step + _REQUEST_S * r.num_requests) / weight)
            slopes.append((slope + decode * added + _REQUEST_S * num) / weight)
        return costs, slopes

    def _draw(self, costs: list[float], slopes: list[float], expected: float) -> int:
        """Fill the cheapest with `expected` requests and this one, up to one level; draw from the filling."""
        order = sorted(range(len(costs)), key=costs.__getitem__)
        level, width, filled = costs[order[0]], 0.0, 0.0
        used = 0
        for i in order:
            if used and filled + (costs[i] - level) * width >= 1.0 + expected:
                break
            filled += (costs[i] - level) * width
            level = costs[i]
            width += 1.0 / max(slopes[i], 1e-9)
            used += 1
        level += (1.0 + expected - filled) / width
        chosen = order[:used]
        if used == 1:
            return chosen[0]
        shares = list(accumulate((level - costs[i]) / max(slopes[i], 1e-9) for i in chosen))
        total = shares[-1]
        draws = [bisect(shares, self._random.random() * total) for _ in range(self._constants.draws)]
        return min((chosen[min(place, used - 1)] for place in draws), key=costs.__getitem__)
