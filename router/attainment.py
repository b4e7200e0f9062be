"""Which promises were kept: of every sequence that ended, as Prometheus families.

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

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from ellm.router.histogram import Histogram
from ellm.router.sequence import Sequence
from ellm.worker.api.output import FinishReason

RECENT = 256  # sequences that the ratio looks back on
RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)


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
            self._recent.setdefault(slo, deque(maxlen=RECENT)).append(attained)
        count = len(sequence.output_ids)
        if found["request"]:
            self._good_tokens += count
        if level.tpot_slo_s is not None and count > 1 and not failed:
            decode_s = sequence.token_at - sequence.first_token_at
            self._ratio.observe(decode_s / (count - 1) / level.tpot_slo_s)

    def families(self, model: str) -> Iterator[Metric]:
        labels = ["model_name", "slo"]
        for name, text, counts in (
            ("ellm_slo_attained", "Sequences that got what they were promised.", self._attained),
            ("ellm_slo_missed", "Sequences that did not.", self._missed),
        ):
            counter = CounterMetricFamily(name, text, labels=labels)
            for slo, count in sorted(counts.items()):
                counter.add_metric([model, slo], count)
            yield counter
        text = f"Share of the last {RECENT} sequences with an SLO that attained it."
        gauge = GaugeMetricFamily("ellm_slo_attainment_ratio", text, labels=labels)
        for slo, recent in sorted(self._recent.items()):
            gauge.add_metric([model, slo], sum(recent) / len(recent))
        yield gauge
        text = "Tokens of sequences that attained their SLOs."
        tokens = CounterMetricFamily("ellm_slo_goodput_tokens", text, labels=labels[:1])
        tokens.add_metric([model], self._good_tokens)
        yield tokens
        buckets, total = self._ratio.samples()
        text = "Mean time per output token, as a share of its SLO."
        histogram = HistogramMetricFamily("ellm_time_per_output_token_slo_ratio", text, labels=labels[:1])
        histogram.add_metric([model], buckets=buckets, sum_value=total)
        yield histogram
