"""What `ellm top` shows: workers as rows of text, from the router's table and its metrics. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BAR = 24  # columns, at most
_COLOURS = {"#": "32", "r": "33", "s": "36", "p": "35", ".": "2"}
_STATES = {"ready": "32", "draining": "33", "loading": "33", "suspect": "33"}
COLUMNS = (
    ("worker", 14), ("state", 9), ("headroom", 9), ("run", 5), ("wait", 5), ("park", 5), ("uncached", 9),
    ("debt", 8), ("step", 8), ("weight", 7), ("SLO", 5),
)  # fmt: skip

Buckets = tuple[tuple[float, float], ...]  # (upper bound, observations up to it)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Of all models of the router."""

    ttft: Buckets = ()
    tpot: Buckets = ()
    counters: Mapping[str, float] = field(default_factory=dict)


_HISTOGRAMS = {
    "ellm_time_to_first_token_seconds_bucket": "ttft",
    "ellm_time_per_output_token_seconds_bucket": "tpot",
}


def parse_metrics(text: str) -> Metrics:
    """From Prometheus' text: the histograms that are shown, and every other sample added up by name."""
    buckets: dict[str, dict[float, float]] = {"ttft": {}, "tpot": {}}
    counters: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("#") or " " not in line:
            continue
        sample, _, value = line.rpartition(" ")
        name, _, labels = sample.partition("{")
        if name in _HISTOGRAMS:
            bound = float(labels.partition('le="')[2].partition('"')[0])
            known = buckets[_HISTOGRAMS[name]]
            known[bound] = known.get(bound, 0.0) + float(value)
        else:
            counters[name] = counters.get(name, 0.0) + float(value)
    ttft, tpot = (tuple(sorted(buckets[name].items())) for name in ("ttft", "tpot"))
    return Metrics(ttft, tpot, counters)


def median(now: Buckets, before: Buckets) -> float | None:
    """Of the observations since `before`: the middle of the bucket that holds it. None without any."""
    earlier = dict(before)
    counts = [(bound, count - earlier.get(bound, 0.0)) for bound, count in now]
    if not counts or counts[-1][1] <= 0.0:
        return None
    below = 0.0
    for bound, count in counts:
        if count >= counts[-1][1] / 2:
            return below if bound == float("inf") else (below + bound) / 2
        below = bound
    return below


def render(
    workers: Sequence[Mapping[str, Any]], now: Metrics, before: Metrics, width: int, *, colour: bool = True
) -> list[str]:
    """The lines of the view, none wider than `width` characters (escape sequences apart)."""
    several = len({worker["model"] for worker in workers}) > 1
    head = _row([name for name, _ in COLUMNS])
    bar = min(BAR, width - len(head) - 4)
    lines = [_summary(workers, now, before)[:width], ""]
    lines.append(_dye(head[:width], "1", colour))
    for worker in workers:
        cells = _cells(worker, several)
        row = _row(cells)[:width]
        state = cells[1][:9]
        row = row.replace(state, _dye(state, _STATES.get(state, "31"), colour), 1)
        lines.append(row + (f"  {_bar(worker, bar, colour)}" if bar >= 6 else ""))
    if not workers:
        lines.append("no workers")
    return lines


def _row(cells: Sequence[str]) -> str:
    """Cut and padded: names to the left, figures to the right."""
    padded = (cell[:size].ljust(size) for cell, (_, size) in zip(cells, COLUMNS, strict=True))
    return "  ".join(text if i < 2 else text.rstrip().rjust(len(text)) for i, text in enumerate(padded))


def _summary(workers: Sequence[Mapping[str, Any]], now: Metrics, before: Metrics) -> str:
    ready = sum(worker["state"] == "ready" for worker in workers)
    waiting = sum(worker.get("num_waiting", 0) for worker in workers)
    running = sum(worker.get("num_running", 0) for worker in workers)
    advice = "followed" if now.counters.get("ellm_controller_seen", 0.0) else "none"
    failovers = now.counters.get("ellm_router_failovers_total", 0.0)
    return (
        f"{ready}/{len(workers)} workers ready   running {running}   waiting {waiting}   "
        f"TTFT {_ms(median(now.ttft, before.ttft))}   TPOT {_ms(median(now.tpot, before.tpot))}   "
        f"failovers {failovers:.0f}   controller's advice: {advice}"
    )


def _cells(worker: Mapping[str, Any], several: bool) -> list[str]:
    name = f"{worker['model']}/{worker['id']}" if several else str(worker["id"])
    if "num_running" not in worker:  # no report yet
        return [name, str(worker["state"]), *["-"] * (len(COLUMNS) - 2)]
    return [
        name,
        str(worker["state"]),
        _tokens(worker["headroom_tokens"]),
        str(worker["num_running"]),
        str(worker["num_waiting"]),
        str(worker["num_parked"]),
        f"{100 * worker['uncached_token_ratio']:.1f} %",
        _ms(worker["recompute_debt_s"]),
        _ms(worker["step_time_s"]),
        "-" if worker.get("weight") is None else f"{worker['weight']:.2f}",
        f"{100 * worker['slo_attainment']:.0f} %",
    ]


def shares(worker: Mapping[str, Any]) -> dict[str, int]:
    """Tokens of a worker's pool and what was promised on it, by the bar's letters."""
    parked = worker.get("parked_tokens", 0)
    recomputed, streamed = worker.get("recomputing_tokens", 0), worker.get("streaming_tokens", 0)
    cached = max(0, worker.get("running_tokens", 0) - recomputed - streamed)
    pool = worker["num_blocks"] * worker["block_size"]
    free = max(0, pool - cached - parked)
    return {"#": cached, "r": recomputed, "s": streamed, "p": parked, ".": free}


def _bar(worker: Mapping[str, Any], width: int, colour: bool) -> str:
    """The shares side by side, each rounded so that the whole is `width` characters."""
    found = shares(worker)
    total = sum(found.values()) or 1
    text, done, drawn = "", 0, 0
    for letter, tokens in found.items():
        done += tokens
        upto = round(width * done / total)
        text += _dye(letter * (upto - drawn), _COLOURS[letter], colour)
        drawn = upto
    return f"[{text}]" if drawn else ""


def _dye(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour and text else text


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.0f} s"


def _tokens(count: float) -> str:
    return f"{count / 1000:.0f}k" if abs(count) >= 10_000 else f"{count:.0f}"
