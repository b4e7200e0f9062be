"""How the rows of holes run in a step, chosen by what steps took: in launches of their own, in one launch
with decode rows, or one layer ahead of the others.

What a step took is held against what the cost model says of it, so that steps of different size can be
compared, and kept per bucket of sizes: which way wins depends on how much waits for memory beside how much
computes. Every way is tried a few times in each bucket and again from time to time; the chosen one is left
only for one that is clearly faster. Steps without holes ask nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from ellm.worker.engine.plan import BatchPlan, HoleWay

TRIALS = 4  # of each way before the first choice
KEPT = 9  # newest measurements of a way
MARGIN = 0.03  # the chosen way is left for one that takes less than 1 - MARGIN of its time
RETRY = 64  # steps of a bucket between two tries of ways that are not chosen
_KV_UNIT = 1024  # tokens

Bucket = tuple[int, int, int]


@dataclass(slots=True)
class _Bucket:
    """Of one size: seconds per predicted second of each way."""

    chosen: HoleWay
    ratios: dict[HoleWay, deque[float]]
    asked: dict[HoleWay, int]
    num_steps: int = 0


@dataclass(slots=True)
class HoleWays:
    """`ways`: at least two, the first of which is chosen until another is known to be better."""

    ways: Sequence[HoleWay]
    _buckets: dict[Bucket, _Bucket] = field(default_factory=dict)

    def choose(self, plan: BatchPlan) -> HoleWay:
        """Of a plan with rows of holes."""
        bucket = self._bucket(plan)
        bucket.num_steps += 1
        way = self._next(bucket)
        bucket.asked[way] += 1
        return way

    def measured(self, plan: BatchPlan, elapsed_s: float, predicted_s: float) -> None:
        """`predicted_s`: by a cost model that has not seen this step; 0 where it knows nothing yet."""
        if plan.way is None or predicted_s <= 0.0:
            return
        bucket = self._bucket(plan)
        bucket.ratios[plan.way].append(elapsed_s / predicted_s)
        times = {way: median(found) for way, found in bucket.ratios.items() if len(found) >= TRIALS}
        if bucket.chosen not in times:
            return
        best = min(times, key=lambda way: times[way])
        if times[best] < (1.0 - MARGIN) * times[bucket.chosen]:
            bucket.chosen = best

    def chosen(self, plan: BatchPlan) -> HoleWay:
        """What stands for plans of this size, trials apart."""
        return self._bucket(plan).chosen

    def _next(self, bucket: _Bucket) -> HoleWay:
        least = min(self.ways, key=lambda way: bucket.asked[way])
        if bucket.asked[least] < TRIALS:
            return least
        if bucket.num_steps % RETRY:
            return bucket.chosen
        # In turn, so that none is judged by times that are long over.
        others = [way for way in self.ways if way != bucket.chosen]
        return others[bucket.num_steps // RETRY % len(others)]

    def _bucket(self, plan: BatchPlan) -> _Bucket:
        key = bucket_of(plan)
        found = self._buckets.get(key)
        if found is None:
            ratios = {way: deque[float](maxlen=KEPT) for way in self.ways}
            found = self._buckets[key] = _Bucket(self.ways[0], ratios, dict.fromkeys(self.ways, 0))
        return found


def bucket_of(plan: BatchPlan) -> Bucket:
    """Powers of two of the rows of holes, the decode rows, and the thousands of tokens these read."""
    again = sum(entry.num_tokens for entry in plan.entries if entry.recompute)
    read = sum(entry.start + 1 for entry in plan.entries[: plan.num_decode])
    return again.bit_length(), plan.num_decode.bit_length(), (read // _KV_UNIT).bit_length()
