"""What `ellm bench` can send from one core, how late it sends, and whether others measure the same.

    python -m ellm.loadtest.generator_limits [--rates 1000,2000,3000] [--seconds 20] [--rounds 3]
                                             [--guidellm PATH] [--vllm PATH]

The target computes nothing (`ellm.loadtest.generator.null_server`) and has one core, the generator's only
sender another. For the agreement the target is paced by the clock and every client sends the same number of
requests of the same lengths at the same rate, in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ellm.loadtest.generator.check import checked_target
from ellm.loadtest.generator.options import Options
from ellm.loadtest.generator.report_json import result_of
from ellm.loadtest.generator.run import run_once
from ellm.loadtest.generator_peers import PEERS, Workload
from ellm.loadtest.result import Result, Row, command_line

LATE_LIMIT_MS, RATE_LIMIT = 2.0, 2_000.0  # what is asked of the generator, the first at half the second
AGREED = 0.05
ABOUT = """\
One sender process on a core of its own against a server that computes nothing on another; {tokens} output
tokens in answer to {prompt} prompt tokens, streamed over kept connections, Poisson arrivals, {seconds:g} s.
`late` is from when a request was due to when it was written; medians over {rounds} rounds, all rates in turn.
`ratio` is completed requests per second against the rate. Agreement: the target is paced by the clock (first
token after so many ms, then one each so many); each client in turn, {count} requests at {rate:g}/s with
{agree_prompt} prompt and {agree_tokens} output tokens, medians of means over {agree_rounds} rounds;
guidellm's TPOT is what it calls inter token latency. The target's own pace is what a client without a cost
would see."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", default="500,1000,2000,3000", help="requests per second")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each rate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8, help="output tokens at those rates")
    parser.add_argument("--guidellm", metavar="PATH", help="its command, in an environment of its own")
    parser.add_argument("--vllm", metavar="PATH", help="the same")
    parser.add_argument("--paces", default="50:10,250:25", help="TTFT:TPOT of the agreement's target, ms")
    parser.add_argument("--agreement-rounds", type=int, default=2)
    parser.add_argument("--agreement-rate", type=float, default=10.0)
    parser.add_argument("--agreement-requests", type=int, default=150)
    parser.add_argument("--port", type=int, default=0, help="of the target; default: a free one")
    parser.add_argument("--name", default="generator", help="slug of the result file")
    return parser.parse_args()


@contextmanager
def null_server(port: int, cpu: int, ttft_ms: float = 0.0, tpot_ms: float = 0.0) -> Iterator[str]:
    """Its URL."""
    words = ["--port", port, "--cpu", cpu, "--ttft-ms", ttft_ms, "--tpot-ms", tpot_ms]
    process = subprocess.Popen(
        [sys.executable, "-m", "ellm.loadtest.generator.null_server", *map(str, words)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith("Ready: "):
            raise RuntimeError("the null server did not start")
        yield line.removeprefix("Ready: ").strip()
    finally:
        process.terminate()
        process.wait(10)


def at_rate(arguments: argparse.Namespace, url: str, rate: float, cpu: int) -> dict[str, float]:
    """One round at one rate."""
    options = Options(
        url,
        rate=rate,
        num_requests=round(rate * arguments.seconds),
        warmup=round(rate),  # a second, in which connections open
        input_tokens="16",
        output_tokens=str(arguments.tokens),
        processes=1,
        seed=1,
    )
    run = run_once(options, checked_target(options), cpus=(cpu,))
    s = result_of(run)["summary"]
    span = s["duration_s"] + 1.0
    return {
        "completed_req_s": s["completed_req_s"],
        "failed": s["failed"],
        "late_p50_ms": 1e3 * s["send_late_p50_s"],
        "late_p99_ms": 1e3 * s["send_late_p99_s"],
        "late_max_ms": 1e3 * s["send_late_max_s"],
        "cpu_share": run.cpu_s / span,
    }


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


def capacity_rows(rates: list[float], rounds: dict[float, list[dict[str, float]]]) -> list[Row]:
    rows: list[Row] = []
    for rate in rates:
        middle = {key: statistics.median(one[key] for one in rounds[rate]) for key in rounds[rate][0]}
        rows.append(
            {
                "what": "one core",
                "rate, req/s": rate,
                "completed, req/s": middle["completed_req_s"],
                "failed": sum(int(one["failed"]) for one in rounds[rate]),
                "late p50, ms": middle["late_p50_ms"],
                "late p99, ms": middle["late_p99_ms"],
                "late p99 of each round, ms": " ".join(f"{one['late_p99_ms']:.2f}" for one in rounds[rate]),
                "core's share": middle["cpu_share"],
                "ratio": middle["completed_req_s"] / rate,
                "against": "the rate",
            }
        )
    return rows


def agreement_rows(pace: str, rounds: dict[str, list[dict[str, float]]]) -> list[Row]:
    ttft_ms, tpot_ms = pace.split(":")
    rows: list[Row] = []
    mine = rounds["ellm bench"]
    for name, measured in rounds.items():
        row: Row = {"what": f"agreement at {ttft_ms} and {tpot_ms} ms: {name}"}
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
    with null_server(arguments.port, cpu, ttft_ms, tpot_ms) as url:
        for number in range(arguments.agreement_rounds):
            work = Workload(url, arguments.agreement_rate, arguments.agreement_requests, 100, 32, number)
            for name in list(measured)[:: 1 if number % 2 == 0 else -1]:
                figures = PEERS[name](programs[name], work) if name in programs else ours(work)
                measured[name].append(figures)
                print(f"  {name}: {figures}", flush=True)
    return measured


def main() -> int:
    arguments = parse()
    rates = [float(word) for word in arguments.rates.split(",")]
    cores = sorted(os.sched_getaffinity(0))
    server_cpu, sender_cpu = cores[0], cores[-1]
    rounds: dict[float, list[dict[str, float]]] = {rate: [] for rate in rates}
    with null_server(arguments.port, server_cpu) as url:
        for _ in range(arguments.rounds):
            for rate in rates:
                rounds[rate].append(at_rate(arguments, url, rate, sender_cpu))
                print(f"  {rate:g}/s: {rounds[rate][-1]}", flush=True)
    paces = arguments.paces.split(",")
    measured = {pace: agreement(arguments, server_cpu, pace) for pace in paces}
    agreed = [row for pace in paces for row in agreement_rows(pace, measured[pace])]
    result = Result(
        name=arguments.name,
        title="The load generator itself",
        about=ABOUT.replace("\n", " ").format(
            tokens=arguments.tokens, prompt=16, seconds=arguments.seconds, rounds=arguments.rounds,
            count=arguments.agreement_requests, rate=arguments.agreement_rate,
            agree_rounds=arguments.agreement_rounds, agree_prompt=100, agree_tokens=32,
        ),
        command=portable(command_line("ellm.loadtest.generator_limits")),
        rows=capacity_rows(rates, rounds) + agreed,
        notes=verdicts(rounds, agreed),
        raw={"rates": {f"{rate:g}": rounds[rate] for rate in rates}, "agreement": measured},
    )  # fmt: skip
    result.notes.append(
        f"load average {os.getloadavg()[0]:.0f} on {len(cores)} cores at the end: other programs ran "
        f"beside it; all of this ran at nice {os.getpriority(os.PRIO_PROCESS, 0)}"
    )
    for line in result.notes:
        print(line)
    print(f"wrote {result.write()}")
    return 0


def verdicts(rounds: dict[float, list[dict[str, float]]], agreed: list[Row]) -> list[str]:
    """What was asked for, and whether it was met."""
    notes = []
    for rate, measured in rounds.items():
        if rate == RATE_LIMIT:
            done = statistics.median(one["completed_req_s"] for one in measured)
            met = "met" if done >= 0.98 * rate else "NOT met"
            notes.append(f"{rate:g} requests/s from one core: {met}, {done:.0f}/s")
        if rate == RATE_LIMIT / 2:
            late = statistics.median(one["late_p99_ms"] for one in measured)
            met = "met" if late <= LATE_LIMIT_MS else "NOT met"
            notes.append(
                f"send-time error p99 at {rate:g}/s at most {LATE_LIMIT_MS:g} ms: {met}, {late:.2f} ms"
            )
    for row in agreed:
        ratios: dict[str, Any] = {key: value for key, value in row.items() if key.startswith("ours /")}
        if ratios:
            met = "met" if all(abs(value - 1.0) <= AGREED for value in ratios.values()) else "NOT met"
            said = ", ".join(f"{key} {value:.3f}" for key, value in ratios.items())
            notes.append(f"{row['what']} within {100 * AGREED:g} %: {met} ({said})")
    return notes


def portable(command: str) -> str:
    """Without where a program lies on this machine."""
    return " ".join(Path(word).name if word.startswith("/") else word for word in command.split())


if __name__ == "__main__":
    raise SystemExit(main())
