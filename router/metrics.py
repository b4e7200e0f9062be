"""What this router counts of one model, and what its workers report. Numbers; how they are shown is
metrics_page.py's, and what all routers count together metrics_sharing.py's.

A count costs well under a microsecond to raise. Series are made when somebody asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from ellm.cluster.api.counters import worker_source
from ellm.router import metrics_declared as declared
from ellm.router.attainment import Attainment
from ellm.router.histogram import Histogram
from ellm.router.policies.candidates import FALLBACKS
from ellm.router.sequence import Sequence as LiveSequence
from ellm.router.usage import Usage
from ellm.worker.api import metrics as worker_metrics
from ellm.worker.api.errors import EllmError
from ellm.worker.api.metrics import Key, Metric
from ellm.worker.api.output import FinishReason
from ellm.worker.api.report import WorkerInfo, WorkerReport

DEATH = "death"  # as the dispatcher calls the loss of a worker that went without a word


class RouterMetrics:
    """One per router and model. It is the dispatcher's observer."""

    def __init__(self, model: str, clock: Callable[[], float]) -> None:
        self.model = model
        self._clock = clock
        self._histograms = {
            metric: Histogram(metric.buckets)
            for metric in declared.HISTOGRAMS
            if metric is not declared.SLO_RATIO  # the attainment's
        }
        self.token_interval = self._histograms[declared.ITL].observe
        self.finished: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.rejections: Counter[str] = Counter()
        self.failovers: Counter[str] = Counter()
        self.decisions: Counter[str] = Counter()
        self._reports: dict[str, tuple[WorkerInfo, WorkerReport, float]] = {}  # epoch -> newest, and when
        self._gone: dict[str, dict[Key, float]] = {}  # source -> its last counts, until they are taken
        self._attainment = Attainment()
        self._usage = Usage()

    def refused(self, error: EllmError) -> None:
        """A request was answered with an error and no output."""
        self.errors[error.code] += 1
        if error.status in (429, 503):
            self.rejections[error.code] += 1

    # DispatchObserver

    def sequence_ended(self, sequence: LiveSequence, reason: FinishReason) -> None:
        self.finished[reason] += 1
        self._attainment.ended(sequence, reason)
        self._usage.ended(sequence, reason)
        if reason not in ("stop", "length") or not sequence.first_token_at:
            return
        now = self._clock()
        first_token_s = sequence.first_token_at - sequence.arrived_at
        decode_s = sequence.token_at - sequence.first_token_at
        self._observe(declared.TTFT, first_token_s)
        self._observe(declared.QUEUE, sequence.queue_time_s)
        self._observe(declared.PREFILL, max(0.0, first_token_s - sequence.queue_time_s))
        self._observe(declared.E2E, now - sequence.arrived_at)
        self._observe(declared.DECODE, decode_s)
        if len(sequence.output_ids) > 1:
            self._observe(declared.TPOT, decode_s / (len(sequence.output_ids) - 1))

    def failover(self, reason: str) -> None:
        self.failovers[reason] += 1

    def decision(self, reason: str) -> None:
        self.decisions[reason] += 1

    def worker_report(self, info: WorkerInfo, report: WorkerReport) -> None:
        self._reports[info.epoch] = (info, report, self._clock())

    def worker_gone(self, info: WorkerInfo, reason: str = "") -> None:
        """Its last word is kept for the book; `reason` is why, where it was lost."""
        entry = self._reports.pop(info.epoch, None)
        if entry is None:
            return
        counts = dict(worker_metrics.counts(*entry[:2]))
        if reason == DEATH:
            counts[declared.LOST.name, self.model] = 1.0
        self._gone[worker_source(info.epoch)] = counts

    # Series

    def series(self) -> Iterator[tuple[Key, float]]:
        """What this router has counted; zeros may be missing."""
        model = self.model
        for metric, histogram in self._histograms.items():
            for part, value in histogram.series():
                yield (metric.name, model, part), value
        for metric, counts in (
            (declared.SUCCESS, self.finished),
            (declared.ERRORS, self.errors),
            (declared.REJECTIONS, self.rejections),
            (declared.FAILOVERS, self.failovers),
            (declared.DECISIONS, self.decisions),
        ):
            for label, count in counts.items():
                yield (metric.name, model, label), count
        for reason in FALLBACKS:
            if count := self.decisions[reason]:
                yield (declared.FALLBACK_CHOICES.name, model, reason), count
        yield from self._attainment.series(model)
        yield from self._usage.series(model)

    def worker_series(self) -> Iterator[tuple[str, dict[Key, float]]]:
        """Source -> counts of each incarnation that is here, and once of those that have gone."""
        gone, self._gone = self._gone, {}
        yield from gone.items()
        for info, report, _ in self._reports.values():
            yield worker_source(info.epoch), dict(worker_metrics.counts(info, report))

    def reports(self) -> Iterator[tuple[WorkerInfo, WorkerReport, float]]:
        """The newest of each worker, with its age in seconds."""
        now = self._clock()
        for info, report, at in self._reports.values():
            yield info, report, max(0.0, now - at)

    def gauges(self, router: str) -> Iterator[tuple[Key, float]]:
        """What holds now at this router alone."""
        for info, _, age_s in self.reports():
            yield (declared.REPORT_AGE.name, self.model, info.worker_id, router), age_s
        yield from self._attainment.recent(self.model, router)

    def _observe(self, metric: Metric, value: float) -> None:
        self._histograms[metric].observe(value)
