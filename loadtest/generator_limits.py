"""What `ellm bench` can send from one core, and how late it sends.

    python -m ellm.loadtest.generator_limits [--rates 1000,2000,3000] [--seconds 20] [--rounds 3]

The target computes nothing (`ellm.loadtest.generator.null_server`) and has one core, the generator's only
sender another.
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

from ellm.loadtest.generator.check import checked_target
from ellm.loadtest.generator.options import Options
from ellm.loadtest.generator.report_json import result_of
from ellm.loadtest.generator.run import run_once
from ellm.loadtest.result import Result, Row, command_line

LATE_LIMIT_MS, RATE_LIMIT = 2.0, 2_000.0  # what is asked of the generator, the first at half the second
KEPT_UP = 0.98  # of what was due
ABOUT = """\
One sender process on a core of its own against a server that computes nothing on another; {tokens} output
tokens in answer to {prompt} prompt tokens, streamed over kept connections, Poisson arrivals, {seconds:g} s.
`late` is from when a request was due to when it was written; medians over {rounds} rounds, all rates in turn.
`ratio` is completed requests per second against those that were due."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", default="500,1000,2000,3000", help="requests per second")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each rate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8, help="output tokens at those rates")
    parser.add_argument("--name", default="generator", help="slug of the result file")
    return parser.parse_args()


@contextmanager
def null_server(cpu: int, ttft_ms: float = 0.0, tpot_ms: float = 0.0) -> Iterator[str]:
    """Its URL."""
    words = ["--port", 0, "--cpu", cpu, "--ttft-ms", ttft_ms, "--tpot-ms", tpot_ms]
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
        "offered_req_s": s["offered_req_s"],
        "completed_req_s": s["completed_req_s"],
        "failed": s["failed"],
        "late_p50_ms": 1e3 * s["send_late_p50_s"],
        "late_p99_ms": 1e3 * s["send_late_p99_s"],
        "late_max_ms": 1e3 * s["send_late_max_s"],
        "cpu_share": run.cpu_s / span,
    }


def capacity_rows(rates: list[float], rounds: dict[float, list[dict[str, float]]]) -> list[Row]:
    rows: list[Row] = []
    for rate in rates:
        middle = {key: statistics.median(one[key] for one in rounds[rate]) for key in rounds[rate][0]}
        rows.append(
            {
                "rate, req/s": rate,
                "due, req/s": middle["offered_req_s"],
                "completed, req/s": middle["completed_req_s"],
                "failed": sum(int(one["failed"]) for one in rounds[rate]),
                "late p50, ms": middle["late_p50_ms"],
                "late p99, ms": middle["late_p99_ms"],
                "late p99 of each round, ms": " ".join(f"{one['late_p99_ms']:.2f}" for one in rounds[rate]),
                "core's share": middle["cpu_share"],
                "ratio": statistics.median(
                    one["completed_req_s"] / one["offered_req_s"] for one in rounds[rate]
                ),
                "against": "what was due",
            }
        )
    return rows


def main() -> int:
    arguments = parse()
    rates = [float(word) for word in arguments.rates.split(",")]
    cores = sorted(os.sched_getaffinity(0))
    rounds: dict[float, list[dict[str, float]]] = {rate: [] for rate in rates}
    with null_server(cores[0]) as url:
        for _ in range(arguments.rounds):
            for rate in rates:
                rounds[rate].append(at_rate(arguments, url, rate, cores[-1]))
                print(f"  {rate:g}/s: {rounds[rate][-1]}", flush=True)
    result = Result(
        name=arguments.name,
        title="The load generator itself",
        about=ABOUT.replace("\n", " ").format(
            tokens=arguments.tokens, prompt=16, seconds=arguments.seconds, rounds=arguments.rounds
        ),
        command=command_line("ellm.loadtest.generator_limits"),
        rows=capacity_rows(rates, rounds),
        notes=[*verdicts(rounds), how_busy()],
        raw={f"{rate:g}": rounds[rate] for rate in rates},
    )
    print("\n".join([*result.notes, f"wrote {result.write()}"]))
    return 0


def verdicts(rounds: dict[float, list[dict[str, float]]]) -> list[str]:
    """What was asked for, and whether it was met."""
    notes = []
    for rate, measured in rounds.items():
        if rate == RATE_LIMIT:
            share = statistics.median(one["completed_req_s"] / one["offered_req_s"] for one in measured)
            met = "met" if share >= KEPT_UP and not any(one["failed"] for one in measured) else "NOT met"
            notes.append(f"{rate:g} requests/s from one core: {met}, {100 * share:.1f} % of what was due")
        if rate == RATE_LIMIT / 2:
            late = statistics.median(one["late_p99_ms"] for one in measured)
            met = "met" if late <= LATE_LIMIT_MS else "NOT met"
            notes.append(
                f"send-time error p99 at {rate:g}/s at most {LATE_LIMIT_MS:g} ms: {met}, {late:.2f} ms"
            )
    return notes


def how_busy() -> str:
    """Whether the machine was ours alone."""
    policy = {os.SCHED_FIFO: "real-time", os.SCHED_RR: "real-time", os.SCHED_IDLE: "idle"}
    return (
        f"load average {os.getloadavg()[0]:.0f} on {len(os.sched_getaffinity(0))} cores at the end; all of "
        f"this ran at {policy.get(os.sched_getscheduler(0), 'normal')} priority"
    )


def portable(command: str) -> str:
    """Without where a program lies on this machine."""
    return " ".join(Path(word).name if word.startswith(("/", "../")) else word for word in command.split())


if __name__ == "__main__":
    raise SystemExit(main())
