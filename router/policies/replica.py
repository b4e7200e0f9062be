"""One worker as one router knows it: its last report, corrected by what this router sent since.

Every report echoes the newest submission of each router that it counts, so what this router has sent and
the report does not know is known exactly, in sequences and in tokens. Of the other routers the same echo
tells how many submissions they make per second. What a report predicts is worked out once, when it comes: a
choice only reads. Times are this router's own clock; it may jump, and reports may hold anything.
"""

from __future__ import annotations

from collections import deque
from math import inf, isfinite

from ellm.router.policies.prompt_keys import RecentPrompts
from ellm.worker.api.prefix_digest import DigestView
from ellm.worker.api.report import WorkerReport

ReplicaId = str  # a worker's epoch

_SMOOTHING = 0.2  # of a new report in the other routers' rate
_UNTRIED_S = 5.0
_MIN_RATE = 1e-3  # rows per second; below it a rate says nothing
_MOST = 1e15
_NOTHING = WorkerReport(seq=-1)


class Replica:
    """Written by the router's link to the worker; policies read it."""

    __slots__ = (
        "_num_steps",
        "_others",
        "_sent",
        "_stepped_at",
        "admit_tokens",
        "block_size",
        "capacity_tokens",
        "digest",
        "foreign_rate",
        "free_tokens",
        "known_since",
        "max_running",
        "num_held",
        "num_unseen",
        "queue_rows",
        "queue_s",
        "ready",
        "recent",
        "replica_id",
        "report",
        "reported_at",
        "row_s",
        "running_tokens",
        "step_s",
        "step_sequence_s",
        "step_token_s",
        "tokens_held",
        "unseen_rows",
        "unseen_tokens",
        "untried",
        "weight",
    )

    def __init__(self, replica_id: ReplicaId, block_size: int = 16) -> None:
        self.replica_id = replica_id
        self.block_size = block_size
        self.report = _NOTHING
        self.reported_at = -inf  # before the first
        # How far back what is known goes, at least: reports travel, and one that does not count what was sent
        # long ago is older than its arrival.
        self.known_since = inf
        self.ready = False  # as the report says
        self.weight = 1.0  # the controller's
        self.admit_tokens = inf  # prompt tokens that this router may still send it
        self.digest = DigestView()
        self.recent = RecentPrompts()
        # Sent by this router, and not in the report yet.
        self.num_unseen = 0  # sequences
        self.unseen_rows = 0  # prompt tokens that are thought to need computing
        self.unseen_tokens = 0  # prompt tokens, cached or not
        self._sent: deque[tuple[int, int, int, int, float]] = deque()  # seq, the three, when
        # The other routers.
        self.foreign_rate = 0.0  # submissions per second
        self._others = (0, -inf)  # their submissions in all, and when
        # What the report says, as a prediction needs it.
        self.num_held = 0  # sequences: running, waiting and parked
        self.max_running = 0
        self.tokens_held = 0.0  # context of the running and the waiting
        self.row_s = 0.0  # of a prompt; 0: not known yet
        self.queue_rows = 0.0  # prompt rows ahead of a new request
        self.queue_s = 0.0  # what else is ahead of it: KV to be brought back
        self.capacity_tokens = 0
        self.free_tokens = 0  # room that nobody was promised; below 0: more was promised than there is
        self.running_tokens = 0.0  # context of the running: room that they make as they end
        # A step of decode rows: a constant (0: nothing is known yet), per sequence, per token of context.
        self.step_s = self.step_sequence_s = self.step_token_s = 0.0

        # It has had nothing to do for a while: what is known of its speed is of another time.
        self.untried = False
        self._num_steps, self._stepped_at = -1, -inf

    @property
    def num_requests(self) -> int:
        """Sequences there, with what is on its way."""
        return self.num_held + self.num_unseen

    def place(self, num: int, rows: int, tokens: int) -> None:
        """`num` sequences are about to be sent; `tokens` of prompts, of which `rows` need computing."""
        self.num_unseen += num
        self.unseen_rows += rows
        self.unseen_tokens += tokens
        self.admit_tokens -= rows

    def withdraw(self, num: int, rows: int, tokens: int) -> None:
        """The opposite, of what was not sent after all."""
        self.num_unseen -= num
        self.unseen_rows -= rows
        self.unseen_tokens -= tokens
        self.admit_tokens += rows

    def sent(self, seq: int, num: int, rows: int, tokens: int, now: float) -> None:
        """What was placed has gone out as submission `seq`."""
        self._sent.append((seq, num, rows, tokens, now))

    def heard(self, report: WorkerReport, router_id: str, now: float) -> None:
        """A report has come. O(routers that send to the worker)."""
        seen, others = -1, 0
        for router, seq in report.last_submit_seq:
            if router == router_id:
                seen = seq
            else:
                others += seq
        while self._sent and self._sent[0][0] <= seen:
            _, num, rows, tokens, _ = self._sent.popleft()
            self.num_unseen -= num
            self.unseen_rows -= rows
            self.unseen_tokens -= tokens
        self.known_since = min(now, self._sent[0][4]) if self._sent else now
        self._count_others(others, now)
        self.report, self.reported_at = report, now
        self.ready = report.state == "ready"
        self.digest.update(report.prefix_digest)
        has_work = report.num_running or report.num_waiting or report.num_parked
        if has_work or report.num_steps != self._num_steps or now < self._stepped_at:
            self._num_steps, self._stepped_at = report.num_steps, now
        self.untried = now - self._stepped_at > _UNTRIED_S
        self._predict(report)

    def _count_others(self, others: int, now: float) -> None:
        before, at = self._others
        if now - at == inf or others < before:  # the first report, or a router has left
            self._others = (others, now)
        elif now > at:
            rate = (others - before) / (now - at)
            self.foreign_rate += _SMOOTHING * (rate - self.foreign_rate)
            self._others = (others, now)
        elif now < at:  # the clock has jumped
            self._others = (others, now)

    def _predict(self, report: WorkerReport) -> None:
        self.num_held = _count(report.num_running + report.num_waiting + report.num_parked)
        self.max_running = _count(report.max_running)
        rate = _finite(report.prefill_rate_tok_s)
        self.row_s = 1.0 / rate if rate > _MIN_RATE else 0.0
        hits, queries = _finite(report.prefix_hits), _finite(report.prefix_queries)
        missed = 1.0 - min(1.0, hits / queries) if queries > 0.0 else 1.0
        waiting = _finite(report.waiting_tokens)
        self.queue_rows = waiting * missed + _finite(report.prefill_tokens)
        self.queue_s = _finite(report.recompute_debt_s)
        self.capacity_tokens = _count(report.num_blocks) * self.block_size
        to_come_back = _finite(report.host_tokens) + _finite(report.dropped_now_tokens)
        self.free_tokens = int(_finite(report.headroom_tokens) - waiting - to_come_back)
        self.running_tokens = _finite(report.running_tokens)
        self.tokens_held = self.running_tokens + waiting
        self.step_s, self.step_sequence_s, self.step_token_s = map(_finite, report.decode_step_s)
        if self.step_s <= 0.0:  # an older worker, or one that knows nothing yet
            self.step_s = _finite(report.step_time_s)


def _finite(value: float) -> float:
    """From 0 to something far beyond any worker; 0 for what is no number."""
    return min(value, _MOST) if isfinite(value) and value > 0.0 else 0.0


def _count(value: float) -> int:
    return int(_finite(value))
