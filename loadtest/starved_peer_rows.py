"""What a starved run of one server comes to: its counters, its row, and ours beside vLLM's."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from ellm.loadtest.peer_servers import VLLM
from ellm.loadtest.result import Row
from ellm.loadtest.sim.metrics import Metrics

ADAPTIVE, CHUNKED = "ellm adaptive", "ellm full-chunked"
# Ours and vLLM's names of the same thing, less the prefix; ours alone has the last four.
COUNTERS = {
    "num_preemptions_total": "preempted",
    "num_parks_total": "parked",
    "recomputed_tokens_total": "recomputed",
    "saved_tokens_total": "saved",
    "loaded_tokens_total": "loaded",
}
_LINE = re.compile(r"^(?:ellm_|vllm:)(\w+)(?:\{[^}]*\})? ([0-9.eE+-]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One starved run. Bytes are of the pool and the host tier."""

    side: str
    host: str  # tier: on or off
    slo: str  # what it is taken from
    slo_s: float
    pool_bytes: int
    host_bytes: int
    metrics: Metrics
    same: float
    tokens: int
    counted: dict[str, float]  # during the run
    late_p99_s: float


def parse_counters(text: str) -> dict[str, float]:
    """Of a Prometheus page, summed over labels; 0 for what it does not have."""
    found = dict.fromkeys(COUNTERS.values(), 0.0)
    for name, value in _LINE.findall(text):
        if name in COUNTERS:
            found[COUNTERS[name]] += float(value)
    return found


def counters(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60.0) as answer:
        return parse_counters(answer.read().decode())


def row_of(outcome: Outcome) -> Row:
    figures, counted = outcome.metrics, outcome.counted
    row: Row = {
        "side": outcome.side,
        "host tier": outcome.host,
        "SLO of": outcome.slo,
        "SLO, ms": 1e3 * outcome.slo_s,
        "KV + host, MiB": f"{outcome.pool_bytes / 2**20:.1f} + {outcome.host_bytes / 2**20:.1f}",
        "output tokens": outcome.tokens,
        "tok/s": figures.throughput_tok_s,
        "goodput": figures.goodput_tok_s,
        "attainment": figures.slo_attainment,
        "goodput strict": figures.goodput_strict_tok_s,
        "attainment strict": figures.slo_attainment_strict,
        "TTFT mean, s": figures.ttft_mean_s,
        "TTFT p99, s": figures.ttft_p99_s,
        "TPOT mean, ms": 1e3 * figures.tpot_mean_s,
        "TPOT p99, ms": 1e3 * figures.tpot_p99_s,
        "preempted": counted["preempted"],
        "same": outcome.same,
    }
    if outcome.side != VLLM:
        row["parked"] = counted["parked"]
        row["recomputed per output"] = counted["recomputed"] / outcome.tokens
    return row


def with_ratios(outcomes: Sequence[Outcome]) -> list[Row]:
    """A row each; ours have what they are beside vLLM with the same bytes. `full-chunked` is to be like vLLM,
    neither better nor worse: its figures are no ratios that one could lose."""
    rows = []
    peers = {(outcome.host, outcome.slo): outcome for outcome in outcomes if outcome.side == VLLM}
    alike = {(outcome.host, outcome.slo): outcome for outcome in outcomes if outcome.side == CHUNKED}
    for outcome in outcomes:
        row = row_of(outcome)
        rows.append(row)
        peer = peers.get((outcome.host, outcome.slo))
        if peer is None or outcome is peer:
            continue
        ours, theirs = outcome.metrics, peer.metrics
        goodput = quotient(ours.goodput_tok_s, theirs.goodput_tok_s)
        if outcome.side == ADAPTIVE:
            row["ratio"] = goodput
            like = alike.get((outcome.host, outcome.slo))
            if like is not None:
                row["by full-chunked"] = quotient(ours.goodput_tok_s, like.metrics.goodput_tok_s)
            row["ratio strict"] = quotient(ours.goodput_strict_tok_s, theirs.goodput_strict_tok_s)
            row["ratio TTFT"] = quotient(theirs.ttft_mean_s, ours.ttft_mean_s)
            row["against"] = VLLM
        else:
            row["goodput by vLLM"] = goodput
            row["preempted by vLLM"] = quotient(outcome.counted["preempted"], peer.counted["preempted"])
    return rows


def quotient(above: float, below: float) -> float | None:
    """Of nothing by nothing: 1; of something by nothing there is none."""
    return above / below if below else None if above else 1.0
