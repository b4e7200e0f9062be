"""Whether other load generators measure what `ellm bench` measures, on the same server and workload.

    python -m ellm.loadtest.generator_agreement [--guidellm PATH] [--vllm PATH] [--paces 50:10,250:25]

The target is paced by the clock (`ellm.loadtest.generator.null_server`), and every client sends the same
number of requests of the same lengths at the same rate, in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
from typing import Any

from ellm.loadtest.generator.check import checked_target
from ellm.loadtest.generator.options import Options
from ellm.loadtest.generator.report_json import result_of
from ellm.loadtest.generator.run import run_once
from ellm.loadtest.generator_limits import how_busy, null_server, portable
from ellm.loadtest.generator_peers import PEERS, Workload
from ellm.loadtest.result import Result, Row, command_line

AGREED = 0.05
PROMPT_TOKENS, OUTPUT_TOKENS = 100, 32
ABOUT = """\
The target is paced by the clock: its first token leaves so many ms after the request was read, then one each
so many. Each client in turn and in both orders, {count} requests at {rate:g}/s (Poisson) with {prompt} prompt
and {tokens} output tokens; medians of means over {rounds} rounds. guidellm's TPOT is what it calls inter
token latency. The target's own pace is what a client without a cost would see."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in PEERS:
        parser.add_argument(f"--{name}", metavar="PATH", help="its command, in an environment of its own")
    parser.add_argument("--paces", default="50:10,250:25", help="TTFT:TPOT of the target, ms")
    parser.add_argument("--rate", type=float, default=10.0)
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--name", default="generator-agreement", help="slug of the result file")
    arguments = parser.parse_args()
    if not any(getattr(arguments, name) for name in PEERS):
        parser.error(f"nobody to agree with: give {' or '.join(f'--{name} PATH' for name in PEERS)}")
    return arguments


def ours(workload: Workload) -> dict[str, float]:
    """The same workload by `ellm bench`'s own parts."""
    options = Options(
        workload.url,
        rate=workload.rate,
        num_requests=workload.num_requests,
        input_tokens=str(workload.prompt_tokens),
        output_tokens=str(workload.output_tokens),
        arrivals="poisson",
        seed=workload.seed,
    )
    s = result_of(run_once(options, checked_target(options)))["summary"]
    assert s["completed"] == workload.num_requests, s["errors"]
    return {
        "ttft_ms": 1e3 * s["ttft_mean_s"],
        "tpot_ms": 1e3 * s["tpot_mean_s"],
        "late_p99_ms": 1e3 * s["send_late_p99_s"],
    }


def agreement_rows(pace: str, rounds: dict[str, list[dict[str, float]]]) -> list[Row]:
    ttft_ms, tpot_ms = pace.split(":")
    rows: list[Row] = []
    mine = rounds["ellm bench"]
    for name, measured in rounds.items():
        row: Row = {"what": f"{ttft_ms} and {tpot_ms} ms: {name}"}
        for key, label in (("ttft_ms", "TTFT mean, ms"), ("tpot_ms", "TPOT mean, ms")):
            row[label] = statistics.median(one[key] for one in measured)
            if name != "ellm bench":
                pairs = zip(mine, measured, strict=True)
                row[f"ours / theirs, {label.split()[0]}"] = statistics.median(
                    a[key] / b[key] for a, b in pairs
                )
        rows.append(row)
    return rows


def agreement(arguments: argparse.Namespace, cpu: int, pace: str) -> dict[str, list[dict[str, float]]]:
    """Every client in turn, in both orders, against one paced server."""
    ttft_ms, tpot_ms = (float(word) for word in pace.split(":"))
    programs = {name: getattr(arguments, name) for name in PEERS if getattr(arguments, name)}
    measured: dict[str, list[dict[str, float]]] = {"ellm bench": [], **{name: [] for name in programs}}
    with null_server(cpu, ttft_ms, tpot_ms) as url:
        for number in range(arguments.rounds):
            work = Workload(url, arguments.rate, arguments.requests, PROMPT_TOKENS, OUTPUT_TOKENS, number)
            for name in list(measured)[:: 1 if number % 2 == 0 else -1]:
                figures = PEERS[name](programs[name], work) if name in programs else ours(work)
                measured[name].append(figures)
                print(f"  {name}: {figures}", flush=True)
    return measured


def main() -> int:
    arguments = parse()
    cpu = min(os.sched_getaffinity(0))
    paces = arguments.paces.split(",")
    measured = {pace: agreement(arguments, cpu, pace) for pace in paces}
    rows = [row for pace in paces for row in agreement_rows(pace, measured[pace])]
    result = Result(
        name=arguments.name,
        title="The load generator beside others",
        about=ABOUT.replace("\n", " ").format(
            count=arguments.requests, rate=arguments.rate, prompt=PROMPT_TOKENS, tokens=OUTPUT_TOKENS,
            rounds=arguments.rounds,
        ),
        command=portable(command_line("ellm.loadtest.generator_agreement")),
        rows=rows,
        notes=[*verdicts(rows), how_busy()],
        raw=measured,
    )  # fmt: skip
    print("\n".join([*result.notes, f"wrote {result.write()}"]))
    return 0


def verdicts(rows: list[Row]) -> list[str]:
    """What was asked for, and whether it was met."""
    notes = []
    for row in rows:
        ratios: dict[str, Any] = {key: value for key, value in row.items() if key.startswith("ours /")}
        if ratios:
            met = "met" if all(abs(value - 1.0) <= AGREED for value in ratios.values()) else "NOT met"
            said = ", ".join(f"{key} {value:.3f}" for key, value in ratios.items())
            notes.append(f"{row['what']}: within {100 * AGREED:g} %: {met} ({said})")
    return notes


if __name__ == "__main__":
    raise SystemExit(main())
