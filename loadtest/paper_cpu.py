"""The part of docs/paper.md that the real engine on a CPU makes: policies, and vLLM, on a starved pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ellm.loadtest.benchmarks_page import cell, table
from ellm.loadtest.sim.paper_runs import OURS
from ellm.loadtest.starved_peer_rows import ADAPTIVE

Row = dict[str, Any]
_POLICIES = (
    "policy",
    "host tier",
    "tok/s",
    "goodput",
    "attainment",
    "TTFT mean, s",
    "preempted",
    "parked",
    "recomputed per output",
    "same tokens",
)
_SERVERS = (
    "side",
    "host tier",
    "SLO of",
    "SLO, ms",
    "goodput",
    "attainment",
    "goodput strict",
    "TTFT mean, s",
    "preempted",
    "parked",
    "recomputed per output",
    "same",
)


def policies(result: Row) -> list[str]:
    """The policies of one engine beside each other."""
    rows, raw = result["rows"], result["raw"]
    ours = [row for row in rows if row["policy"] == OURS]
    ratios = " and ".join(
        f"{cell(row['ratio'])}x with the host tier {row['host tier']} (time to first token "
        f"{cell(row['ratio TTFT'])}x)"
        for row in ours
    )
    return [
        "",
        "## The engine itself, on a CPU",
        "",
        f"A small model and a pool so small that the arrivals, {raw['rate']:.1f} requests per second, hold "
        f"{cell(raw['offered_context_peak_tokens'])} tokens of context where they have room; the SLO is "
        f"{cell(1e3 * raw['tpot_slo_s'])} ms, a step at a full pool takes {cell(1e3 * raw['full_step_s'])}:",
        "",
        *_table(rows, _POLICIES),
        "",
        f"- Goodput over `full-recompute`: {ratios}. Less than on a GPU: here each row of a step costs, "
        "so that what is recomputed is paid for, and fewer sequences at once take shorter steps.",
        *[f"- {note}" for note in result["notes"]],
        f"- {_source(result)}",
    ]


def _beside_vllm(rows: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(
        f"host tier {row['host tier']}, SLO of {row['SLO of']}: {cell(row['ratio'])}x, "
        f"strictly {cell(row['ratio strict'])}x, time to first token {cell(row['ratio TTFT'])}x"
        for row in rows
        if row["side"] == ADAPTIVE
    )


def servers(result: Row, elsewhere: Row, in_place: Row, apart: Row) -> list[str]:
    """Our server, vLLM's CPU build, and our policy that does what vLLM does: without a host tier, also on
    another processor, with its bytes as more pool, the default on a CPU, and with the tier apart from the
    pool, as on a GPU."""
    rows = result["rows"]
    return [
        "",
        "### Beside vLLM's CPU build, over HTTP",
        "",
        "The same arrivals to each server, three times more context than the pool holds when ours serves "
        "them with room for all (vLLM, whose steps are longer, then holds more). In the runs with a host "
        "tier vLLM has its bytes as more pool. `unstarved` is 1.1 times what 95 % of the requests of the "
        "slower keep with room for all, `full pool` 1.13 times its step when as many run as the pool without "
        "a host tier holds, `full pool, faster` (where it was run) 1.13 times that of the faster:",
        "",
        *_table(rows, _SERVERS),
        "",
        f"- Goodput over vLLM's: {_beside_vllm(rows)}.",
        f"- On a processor with AVX-512, where arrivals outrun both: {_beside_vllm(elsewhere['rows'])}. "
        f"{_source(elsewhere)}",
        "- With the host tier as more of our pool, the default on a CPU, another run: "
        f"{_beside_vllm(in_place['rows'])}. {_source(in_place)}",
        "- With the host tier apart from the pool, as on a GPU, a third run, on an engine of longer steps: "
        f"{_beside_vllm(apart['rows'])}. {_source(apart)}",
        "- Where the SLO is far above a step at a full pool, a preempted request makes up for its pause, and "
        "nobody needs a plan; the same bytes are worth more as pool then than as host tier.",
        "- With twice the pool vLLM runs twice as many at once, and their steps are longer than the SLO "
        "that was made for the smaller pool: that ratio is the worth of planning for an SLO, not of memory. "
        "An operator who knew the load would lower its `max_num_seqs`.",
        *[f"- {note}" for note in result["notes"]],
        f"- {_source(result)}",
    ]


def _table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    return table([{key: row.get(key) for key in keys} for row in rows])


def _source(result: Row) -> str:
    return f"Made by `{result['command']}`; values in `loadtest/results/{result['file']}`."
