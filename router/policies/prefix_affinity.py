"""The worker that has most of the prompt cached, unless it is far busier than the rest."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ellm.router.policies.base import Choice, RoutedRequest
from ellm.router.policies.candidates import STALE, candidates
from ellm.router.policies.power_of_two import less_loaded
from ellm.router.policies.prefixes import Prefixes
from ellm.router.policies.replica import Replica

LEAST_SHARE = 0.3  # of the prompt: less is what all prompts have in common, and no reason to crowd
LOAD_CAP = 1.5  # of the mean number of sequences
SLACK = 2  # sequences: a cap on an idle cluster would forbid every hit


class PrefixAffinity:
    """Without a hit under the cap it takes the less loaded of two. `seed` makes choices reproducible."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def choose(self, request: RoutedRequest, replicas: Sequence[Replica], now: float) -> Choice | None:
        there = candidates(replicas, now)
        if not there.replicas:
            return None
        prefixes = Prefixes(request, now, there.replicas)
        chosen, reason = self._best(request, there.replicas, prefixes), "prefix-affinity"
        if chosen is None or there.fallback == STALE:
            chosen, reason = less_loaded(self._random, there.replicas), "prefix-miss"
        return Choice(chosen.replica_id, there.fallback or reason, prefixes.placed(chosen))

    def _best(
        self, request: RoutedRequest, replicas: Sequence[Replica], prefixes: Prefixes
    ) -> Replica | None:
        least = LEAST_SHARE * len(request.prompt_ids)
        tokens = {name: count for name, count in prefixes.tokens.items() if count >= least}
        if not tokens:
            return None
        mean = sum(replica.num_requests for replica in replicas) / len(replicas)
        cap = LOAD_CAP * mean + SLACK
        hits = [r for r in replicas if r.replica_id in tokens and r.num_requests <= cap]
        if not hits:
            return None
        return max(hits, key=lambda r: (tokens[r.replica_id], -r.num_requests))
