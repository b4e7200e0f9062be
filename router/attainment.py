"""Which promises were kept, of every sequence that ended.

    tpot        every token i came by t_first + SLO * (i + 4)
    tpot_mean   the mean time per token after the first was within the SLO
    ttft        the first token came in time
    request     tpot and ttft, as far as each was promised: the definition of goodput

Times are the router's, when a token has come from its worker; a paced stream then holds it, but never beyond
its deadline. A sequence that ended with an error missed what it was promised. One whose client left counts
nowhere: why it left is not known.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

from ellm.router.histogram import Histogram
from ellm.router.metrics_declared import (
    ATTAINED,
    GOODPUT,
    MISSED,
    RATIO_BUCKETS,
    RECENT,
    RECENT_KEPT,
    SLO_RATIO,
)
from ellm.router.sequence import Sequence
from ellm.worker.api.metrics import Key
from ellm.worker.api.output import FinishReason

LAST = 256  # sequences that the ratio looks back on


def verdicts(sequence: Sequence, failed: bool) -> dict[str, bool]:
    """What it was promised, and whether it got it. Empty without a promise."""
    level, count = sequence.level, len(sequence.output_ids)
    if not failed and not count:
        return {}  # asked for no token: a prompt was scored
    failed = failed or not sequence.first_token_at
    found: dict[str, bool] = {}
    if level.tpot_slo_s is not None:
        found["tpot"] = not (failed or sequence.late)
        decode_s = sequence.token_at - sequence.first_token_at
        found["tpot_mean"] = not failed and decode_s <= level.tpot_slo_s * max(1, count - 1)
    if level.ttft_slo_s is not None:
        found["ttft"] = not failed and sequence.first_token_at - sequence.arrived_at <= level.ttft_slo_s
    if found:
        found["request"] = found.get("tpot", True) and found.get("ttft", True)
    return found


class Attainment:
    """One per router."""

    def __init__(self) -> None:
        self._attained: Counter[str] = Counter()
        self._missed: Counter[str] = Counter()
        self._recent: dict[str, deque[bool]] = {}
        self._ratio = Histogram(RATIO_BUCKETS)
        self._good_tokens = 0

    def ended(self, sequence: Sequence, reason: FinishReason) -> None:
        level = sequence.level
        if reason == "abort" or (level.tpot_slo_s is None and level.ttft_slo_s is None):
            return
        failed = reason == "error"
        found = verdicts(sequence, failed)
        for slo, attained in found.items():
            (self._attained if attained else self._missed)[slo] += 1
            self._recent.setdefault(slo, deque(maxlen=LAST)).append(attained)
        count = len(sequence.output_ids)
        if found.get("request"):
            self._good_tokens += count
        if level.tpot_slo_s is not None and count > 1 and not failed:
            decode_s = sequence.token_at - sequence.first_token_at
            self._ratio.observe(decode_s / (count - 1) / level.tpot_slo_s)

    def series(self, model: str) -> Iterator[tuple[Key, float]]:
        """What only grows."""
        for metric, counts in ((ATTAINED, self._attained), (MISSED, self._missed)):
            for slo, count in counts.items():
                yield (metric.name, model, slo), count
        if self._good_tokens:
            yield (GOODPUT.name, model), self._good_tokens
        for part, value in self._ratio.series():
            yield (SLO_RATIO.name, model, part), value

    def recent(self, model: str, router: str) -> Iterator[tuple[Key, float]]:
        """Of the last sequences, how many there were and how many kept it: for the ratio of all routers."""
        for slo, recent in self._recent.items():
            yield (RECENT, model, slo, router), len(recent)
            yield (RECENT_KEPT, model, slo, router), sum(recent)
