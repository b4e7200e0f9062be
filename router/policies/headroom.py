"""The default: the worker on which the request is predicted to cost least, waiting and slowing included.

    wait    (rows ahead + own rows that are not cached) / prefill rate + KV to be brought back
            + what is missing of memory and places / the rate at which the running give them up
    cost    (wait + output * step time * (1 + barrier)) / min(1, the controller's weight / BRAKE)

Pace, room and debt make the controller's weights too: what is predicted here would count twice. So a weight
counts only where the controller wants a worker to get less than a fifth of the mean, for reasons that may be
none of these; 0 is none (candidates.py).

Everything that this router has sent since the report is counted in. The barrier rises as the promised memory
nears the pool: there, holes and parking begin to cost every step. Other routers see the same reports and
choose at the same time. How many requests they have sent since is estimated from how fast they send and how
old the report is; those are thought of as filling the cheapest workers up to one level, and the choice is
drawn from what that filling would give each: with new reports it is the cheapest, with old ones it is spread.
Of two draws the cheaper one is taken.

A worker that has had nothing to do for a while may be faster than it was: what slowed it down may be over,
and only a request can show it. Until then it is taken to be at most thrice as slow as the quickest; else one
bad moment would keep every request from it for ever.

Of many workers it looks at a few: those that seem to have most of the prompt, and some drawn anew for each
request. What a decision costs is what it reads, and of a few at random the best is nearly the best of all,
while routers that look at different workers herd less.
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

_ROW_S, _STEP_S = 1e-4, 0.02  # where no worker has told any
_STEPS = 2.5  # that every prompt waits for: two are planned already, and it comes while the first runs
_REQUEST_S = 1e-6  # of each sequence: fewer are better where nothing else tells workers apart
_MANY, _LOOKS = 16, 8  # beyond so many workers, so many are drawn
_SLOWER = 3.0  # than the quickest, of one that has had nothing to do for a while
BRAKE = 0.2  # of the mean weight
_MIN_WEIGHT, _MIN_SLOPE = 1e-6, 1e-9


@dataclass(frozen=True, slots=True)
class Constants:
    """Frozen on one seed of the simulator and judged on others: docs/routing.md."""

    decode: float = 0.2  # a second of decoding, in seconds of waiting
    knee: float = 0.85  # share of memory promised, from which the barrier rises
    barrier: float = 0.5  # of a step's time, at a full pool; squared in between
    draws: int = 2


class Headroom:
    """`seed` makes its choices reproducible."""

    def __init__(self, seed: int | None = None, constants: Constants = Constants()) -> None:
        self._random = random.Random(seed)
        self._decode, self._barrier, self._draws = constants.decode, constants.barrier, constants.draws
        self._knee = 1.0 - constants.knee  # as a share that is free

    def choose(self, request: RoutedRequest, replicas: Sequence[Replica], now: float) -> Choice | None:
        prefixes = Prefixes(request, now)
        there = candidates(self._some(replicas, prefixes), now)
        if there.fallback or not there.replicas:
            there = candidates(replicas, now)
        if not there.replicas:
            return None
        if there.fallback == STALE:
            return Choice(less_loaded(self._random, there.replicas).replica_id, STALE)
        expected = sum([r.foreign_rate * (now - r.known_since) for r in there.replicas if r.foreign_rate])
        costs, slopes = self._costs(request, there.replicas, prefixes.tokens)
        chosen = there.replicas[self._draw(costs, slopes, max(0.0, expected))]
        return Choice(chosen.replica_id, there.fallback or "headroom", prefixes.placed(chosen))

    def _some(self, replicas: Sequence[Replica], prefixes: Prefixes) -> Sequence[Replica]:
        """All if they are few. What they have of the prompt is looked up."""
        having = prefixes.beginnings(replicas)
        prefixes.look_at(replicas, having)
        if len(replicas) <= _MANY:
            return replicas
        if len(having) > _LOOKS:
            self._random.shuffle(having)  # of those that have as much
            having.sort(key=lambda i: prefixes.tokens.get(replicas[i].replica_id, 0), reverse=True)
        drawn = self._random.sample(range(len(replicas)), _LOOKS)
        return [replicas[i] for i in {*drawn, *having[:_LOOKS]}]

    def _costs(
        self, request: RoutedRequest, replicas: Sequence[Replica], cached: dict[str, int]
    ) -> tuple[list[float], list[float]]:
        """Seconds, and how many more each further request like this one would cost."""
        output, num = request.output_tokens, request.num_sequences
        prompt = len(request.prompt_ids) * num
        room = prompt + 0.5 * output * num
        usual = min([r.row_s for r in replicas if r.row_s], default=_ROW_S)
        knee, barrier, decode = self._knee, self._barrier, self._decode * output
        quickest = _quickest(replicas) if any([r.untried for r in replicas]) else 0.0
        costs, slopes = [], []
        for r in replicas:
            requests, row_s, step_s = r.num_held + r.num_unseen, r.row_s or usual, r.step_s or _STEP_S
            sequence_s, token_s = r.step_sequence_s, r.step_token_s
            if r.untried:
                row_s = min(row_s, _SLOWER * usual)
                trust = min(1.0, _SLOWER * quickest / (step_s + sequence_s))
                step_s, sequence_s, token_s = trust * step_s, trust * sequence_s, trust * token_s
            slope = (prompt - cached.get(r.replica_id, 0)) * row_s
            wait = (r.queue_rows + r.unseen_rows) * row_s + r.queue_s + slope
            added = sequence_s * num + token_s * room
            step_s += sequence_s * requests + token_s * (r.tokens_held + r.unseen_tokens) + added
            wait += _STEPS * step_s
            free = r.free_tokens - r.unseen_tokens - room
            roomy = knee * r.capacity_tokens  # 0 where the memory is not known
            if free < 0.0 < roomy:
                missing_s = output * step_s / max(r.running_tokens, roomy)
                wait -= free * missing_s
                slope += room * missing_s
            places = requests + num - r.max_running
            if places > 0 and r.max_running:
                place_s = output * step_s / r.max_running
                wait += places * place_s
                slope += num * place_s
            slow = decode
            if roomy and free < roomy:
                full = 1.0 - max(free, 0.0) / roomy
                slow += decode * barrier * full * full
            weight = max(min(1.0, r.weight / BRAKE), _MIN_WEIGHT)
            costs.append((wait + slow * step_s + _REQUEST_S * requests) / weight)
            slopes.append((slope + slow * added + _REQUEST_S * num) / weight)
        return costs, slopes

    def _draw(self, costs: list[float], slopes: list[float], expected: float) -> int:
        """Fill the cheapest with `expected` requests and this one, up to one level; draw from the filling."""
        order = sorted(range(len(costs)), key=costs.__getitem__)
        level, width, filled = costs[order[0]], 0.0, 0.0
        used = 0
        for i in order:
            rise = (costs[i] - level) * width
            if filled + rise >= 1.0 + expected:
                break
            filled += rise
            level = costs[i]
            width += 1.0 / max(slopes[i], _MIN_SLOPE)
            used += 1
        if used == 1:
            return order[0]
        level += (1.0 + expected - filled) / width
        shares = list(accumulate([(level - costs[i]) / max(slopes[i], _MIN_SLOPE) for i in order[:used]]))
        draws = [bisect(shares, self._random.random() * shares[-1]) for _ in range(self._draws)]
        return min([order[min(place, used - 1)] for place in draws], key=costs.__getitem__)


def _quickest(replicas: Sequence[Replica]) -> float:
    """Seconds of a step with one sequence, on the worker where that takes least."""
    return min([(r.step_s or _STEP_S) + r.step_sequence_s for r in replicas])
