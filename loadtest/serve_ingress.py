"""`ellm serve` beside a plain application of Ray Serve, under one load generator.

    python -m ellm.loadtest.serve_ingress [--rates 5,20] [--tokens 64] [--seconds 20] [--rounds 3]

Both sides run our engine on the simulated executor: a step of 10 ms gives every request one token. What
differs is the way of a token from the engine to the client: here a router that reads one stream of all
requests of a worker, behind HAProxy; there a FastAPI ingress (`plain_ingress`) that reads a handle's stream
for each request, behind Serve's own proxy.
"""

from __future__ import annotations

import argparse
import os
import statistics
from contextlib import ExitStack
from typing import Any

from ellm.loadtest.generator.check import checked_target
from ellm.loadtest.generator.options import Options
from ellm.loadtest.generator.report_json import result_of
from ellm.loadtest.generator.run import run_once
from ellm.loadtest.generator_limits import how_busy
from ellm.loadtest.http_sides import QUIET
from ellm.loadtest.processes import tree_use
from ellm.loadtest.result import Result, Row, command_line
from ellm.loadtest.served import SERVE, started

STEP_MS = 10.0
RATIOS = {
    "ttft_mean_s": "ratio",
    "tpot_mean_s": "ratio TPOT",
    "itl_p99_s": "ratio ITL p99",
    "cpu_us_per_token": "ratio CPU",
}
FIGURES = ("ttft_mean_s", "ttft_p99_s", "tpot_mean_s", "itl_p99_s", "e2e_mean_s")

ABOUT = """\
Both sides run our engine on the simulated executor: a step of {step:g} ms gives every request one token.
Ours is `ellm serve` (HAProxy, router, one stream per worker); the other a FastAPI ingress that streams from
an engine deployment by handle, behind Serve's own proxy. {tokens} tokens an answer, Poisson arrivals for
{seconds:g} s, both servers up, sides in turn and in both orders; medians over {rounds} rounds. `ratio` is
their mean TTFT over ours."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", default="2,8", help="requests per second")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each rate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8177, help="and the next one")
    parser.add_argument("--name", default="serve-ingress", help="slug of the result file")
    return parser.parse_args()


def measure(url: str, pid: int, rate: float, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One round of one side, and the CPU time of its processes per token."""
    options = Options(
        url,
        rate=rate,
        num_requests=max(4, round(rate * arguments.seconds)),
        warmup=4,
        input_tokens="32",
        output_tokens=str(arguments.tokens),
        prompt_ids=True,
        seed=seed,
        timeout_s=120.0,
    )
    target = checked_target(options)
    before = sum(use.cpu_s for use in tree_use(pid).values())
    summary = result_of(run_once(options, target))["summary"]
    spent = sum(use.cpu_s for use in tree_use(pid).values()) - before
    figures = {name: summary[name] for name in FIGURES}
    tokens = max(1, summary["output_tokens"])
    return {**figures, "completed": summary["completed"], "failed": summary["failed"],
            "late_p99_s": summary["send_late_p99_s"], "cpu_us_per_token": 1e6 * spent / tokens}  # fmt: skip


def rows_of(measured: dict[str, dict[float, list[dict[str, Any]]]]) -> list[Row]:
    rows: list[Row] = []
    ours, theirs = measured["ellm serve"], measured["plain Serve"]
    for rate in ours:
        for name, rounds in (("ellm serve", ours[rate]), ("plain Serve", theirs[rate])):
            row: Row = {"side": name, "rate, req/s": rate, "failed": sum(one["failed"] for one in rounds)}
            for figure in FIGURES:
                label = figure.removesuffix("_s").replace("_", " ") + ", ms"
                row[label] = 1e3 * statistics.median(one[figure] for one in rounds)
            row["CPU, us per token"] = statistics.median(one["cpu_us_per_token"] for one in rounds)
            if name == "ellm serve":
                for figure, label in RATIOS.items():
                    pairs = zip(ours[rate], theirs[rate], strict=True)
                    row[label] = statistics.median(b[figure] / a[figure] for a, b in pairs)
                row["against"] = "plain Serve, its time over ours"
            rows.append(row)
    return rows


def main() -> int:
    arguments = parse()
    rates = [float(word) for word in arguments.rates.split(",")]
    model = f"simulated:overhead_s={STEP_MS / 1e3},vocab_size=4096"
    programs = {
        "ellm serve": (SERVE, ["serve", model, "--workers", "1"]),
        "plain Serve": ("ellm.loadtest.plain_ingress", ["--stages", "2", "--model", model]),
    }
    measured: dict[str, dict[float, list[dict[str, Any]]]] = {
        name: {rate: [] for rate in rates} for name in programs
    }
    with ExitStack() as stack:
        sides = []
        for number, (name, (module, words)) in enumerate(programs.items()):
            port = str(arguments.port + number)
            env = None if module == SERVE else {**os.environ, **QUIET}
            server = stack.enter_context(started(module, [*words, "--port", port], env))
            sides.append((name, server.url, server.pid))
        for number in range(arguments.rounds):
            for rate in rates:
                for name, url, pid in sides[:: 1 if number % 2 == 0 else -1]:
                    measured[name][rate].append(measure(url, pid, rate, arguments, number))
                    print(f"  {rate:g}/s {name}: {measured[name][rate][-1]}", flush=True)
    result = Result(
        name=arguments.name,
        title="The way of a token: our router beside Ray Serve's plain ingress",
        about=ABOUT.replace("\n", " ").format(
            step=STEP_MS, tokens=arguments.tokens, seconds=arguments.seconds, rounds=arguments.rounds
        ),
        command=command_line("ellm.loadtest.serve_ingress"),
        rows=rows_of(measured),
        notes=[how_busy()],
        raw=measured,
    )
    print(f"wrote {result.write()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
