"""How much of the new requests each worker should get, and how many prompt tokens at once. Pure.

    weight_i ~ pace_i * room_i * (1 - uncached_i) / (1 + debt_i / DEBT_S) * (1 + attainment_i) / 2

pace: prefill rate over the model's median, or the median step time over its own, whichever is worse: a slow
    device, and one whose neighbours make it slow, gets less. Prefill rates hardly depend on load; step times
    do, which makes this a brake.
room: h / (h + 0.1) * 1.1 for the share h of its pool that is free: nearly 1 down to a quarter, falling ever
    faster towards 0. Relative, since memory fills where requests stay: a small pool runs out of room sooner,
    whatever it was given, and its weight falls until what comes and what leaves are equal.
uncached: the share of admitted context without KV. Each such token costs its recompute or its way back from
    the host once more: what is sent there displaces what was promised.
debt: predicted extra time of a step plus what must be brought back; DEBT_S of it halve the weight.
attainment: of promises; one that keeps none gets half.

Raw weights are smoothed with a time constant, since routers follow them a second late: unsmoothed, all would
turn to the same worker together. What a router sees itself within that second (the queue, what it sent) is
not in them. The default policy predicts pace, room and debt itself and goes by a weight only below a fifth
of the mean (router/policies/headroom.py), where it is a brake. A ready worker never falls below FLOOR of the
mean: without requests it could not show that it is well again. Weights of a model have mean 1 over those that
serve; others have 0 at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median

from ellm.cluster.health import Track
from ellm.worker.api.report import WorkerReport

DEBT_S = 0.5
FLOOR = 0.05
_ROOM = 0.1
_PACE = (0.1, 2.0)


def update_weights(tracks: Iterable[Track], elapsed_s: float, smoothing_s: float) -> dict[str, float]:
    """Epoch -> weight of the workers of one model; also kept in each track, unscaled."""
    tracks = list(tracks)
    serving = [track for track in tracks if track.serving]
    raws = raw_weights(serving)
    keep = math.exp(-max(0.0, elapsed_s) / smoothing_s)
    for track, raw in zip(serving, raws, strict=True):
        track.weight = raw if track.weight is None else raw + (track.weight - raw) * keep
    for track in tracks:
        if not track.serving:
            track.weight = None
    total = sum(track.weight or 0.0 for track in serving)
    scale = len(serving) / total if total > 0.0 else 0.0
    weights = {track.info.epoch: 0.0 for track in tracks}
    for track in serving:
        weights[track.info.epoch] = max(FLOOR, (track.weight or 0.0) * scale) if scale else 1.0
    return weights


def raw_weights(serving: Sequence[Track]) -> list[float]:
    """Of serving workers of one model, by what they report now: at least 0, not scaled."""
    reports = [track.report for track in serving if track.report is not None]
    assert len(reports) == len(serving)
    rates = [report.prefill_rate_tok_s for report in reports if _known(report.prefill_rate_tok_s)]
    steps = [report.step_time_s for report in reports if _known(report.step_time_s)]
    rate, step = median(rates) if rates else 0.0, median(steps) if steps else 0.0
    return [
        _pace(report, rate, step) * _shape(report, headroom_share(report, track.info.block_size))
        for track, report in zip(serving, reports, strict=True)
    ]


def _shape(report: WorkerReport, room: float) -> float:
    whole = 1.0 - _share(report.uncached_token_ratio)
    debt = report.recompute_debt_s if _known(report.recompute_debt_s) else 0.0
    kept = (1.0 + _share(report.slo_attainment)) / 2
    return room / (room + _ROOM) * (1.0 + _ROOM) * whole / (1.0 + debt / DEBT_S) * kept


def _pace(report: WorkerReport, median_rate: float, median_step_s: float) -> float:
    low, high = _PACE
    by_rate = by_step = high
    if _known(report.prefill_rate_tok_s):
        by_rate = report.prefill_rate_tok_s / median_rate
    if _known(report.step_time_s):
        by_step = median_step_s / report.step_time_s
    if not _known(report.prefill_rate_tok_s) and not _known(report.step_time_s):
        return 1.0  # it has not run yet
    return min(high, max(low, min(by_rate, by_step)))


def headroom_share(report: WorkerReport, block_size: int) -> float:
    """Of the pool; 1 where the report does not say how large that is."""
    pool = report.num_blocks * block_size
    return _share(report.headroom_tokens / pool) if pool > 0 else 1.0


def admit_tokens(report: WorkerReport, period_s: float, plan_s: float) -> int:
    """Prompt tokens that the worker can take until the next word: what it computes in `period_s` + `plan_s`,
    less what it has yet to compute, and no more than there is room for. -1 where its rate is not known."""
    rate = report.prefill_rate_tok_s
    if not _known(rate):
        return -1
    queued = report.waiting_tokens + report.prefill_tokens
    work = rate * (period_s + plan_s - min(report.recompute_debt_s, plan_s)) - queued
    room = report.headroom_tokens - report.waiting_tokens
    return max(0, int(min(work, room)))


def _known(value: float) -> bool:
    return math.isfinite(value) and value > 0.0


def _share(value: float) -> float:
    return min(1.0, max(0.0, value)) if math.isfinite(value) else 0.0
