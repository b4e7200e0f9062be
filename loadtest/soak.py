"""A long run of `ellm serve` under the load generator: does anything grow that should not?

    python -m ellm.loadtest.soak [--minutes 30] [--rate 3] [--trace FILE] [--html soak.html]
    ... --rate 2 --trace AZURE --trace-scale 0.1 --kv-blocks 48 --min-step-ms 80 --gather-s 20     # starved

Starts a local cluster with a KV pool that is too small for what comes, keeps it under open-loop load with
some clients that leave, and samples every process of it: memory, file handles, KV blocks, queues. At the end
no block may be referenced, and memory, handles and latency must be flat (`ellm.loadtest.soak_verdict`).
"""

from __future__ import annotations

import argparse
import json
import os
import time
import urllib.request
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ellm.loadtest.generator.check import checked_target
from ellm.loadtest.generator.live import LiveLine
from ellm.loadtest.generator.options import Options
from ellm.loadtest.generator.report_html import page_of
from ellm.loadtest.generator.report_json import result_of
from ellm.loadtest.generator.run import run_once
from ellm.loadtest.generator.svg import Series, plot
from ellm.loadtest.processes import label, process_memory, process_tree, process_use
from ellm.loadtest.result import RESULTS, Result, Row, command_line
from ellm.loadtest.served import SERVE, Started, started
from ellm.loadtest.sim.traces import read_trace
from ellm.loadtest.soak_load import THIRDS, repeated, write_thirds
from ellm.loadtest.soak_verdict import Sample, Trend, trends

PERIOD_S = 5.0
FULL = 0.85  # of the blocks: from here on the pools count as full
SETTLE_S = 3.0  # after the last request, for the workers' next reports


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=3.0, help="requests per second")
    parser.add_argument("--trace", help="arrivals and lengths from a trace, stretched to the rate")
    parser.add_argument("--trace-scale", type=float, default=0.25, help="factor on its lengths")
    parser.add_argument(
        "--gather-s", type=float, default=0.0, help="requests of a trace's so many seconds come at once"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kv-blocks", type=int, default=256, help="of each worker; 16 tokens each")
    parser.add_argument(
        "--min-step-ms", type=float, default=0.0,
        help="a step takes so long at least, as a larger model's would: few requests then fill the pools",
    )  # fmt: skip
    parser.add_argument("--cancel", type=float, default=0.05, help="share of clients that leave")
    parser.add_argument("--port", type=int, default=8176)
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the server")
    parser.add_argument("--html", help="default: beside the result file")
    parser.add_argument("--name", default="soak", help="slug of the result file")
    return parser.parse_args()


def server(arguments: argparse.Namespace) -> AbstractContextManager[Started]:
    """`ellm serve` as the soak wants it."""
    words = ["--port", arguments.port, "--workers", arguments.workers, "--kv-blocks", arguments.kv_blocks]
    words += [
        "--device",
        "cpu",
        "--policy",
        "adaptive",
        "--tpot-slo-ms",
        200,
        "--set",
        "worker.cache.host_bytes=33554432",
        "--set",
        "worker.cache.host_tier=copied",
        "--set",
        f"worker.min_step_s={arguments.min_step_ms / 1e3}",
    ]
    environment = os.environ | dict(text.split("=", 1) for text in arguments.env)
    return started(SERVE, ("serve", *map(str, words)), environment)


class Sampler:
    """Looks at the server's processes and workers every `PERIOD_S`; called more often it does nothing."""

    def __init__(self, pid: int, url: str) -> None:
        self._pid = pid
        self._url = f"{url}/admin/workers"
        self._next_s = 0.0
        self.samples: list[Sample] = []

    def __call__(self, start_s: float) -> None:
        now = time.monotonic()
        if now >= self._next_s:
            self._next_s = now + PERIOD_S
            self.samples.append(self.look(now - start_s))

    def look(self, time_s: float) -> Sample:
        held: dict[str, float] = {}
        resident: dict[str, float] = {}
        handles = 0
        pids = process_tree(self._pid)
        for pid in pids:
            use = process_use(pid)
            if use is not None:
                name = label(use.command).partition(".")[0]  # without the method that runs now
                memory = process_memory(pid)
                held[name] = held.get(name, 0.0) + memory.held_bytes / 2**20
                resident[name] = resident.get(name, 0.0) + memory.resident_bytes / 2**20
                handles += open_handles(pid)
        workers = self.workers()
        return Sample(
            time_s,
            held,
            resident,
            handles,
            len(pids),
            sum(referenced(worker) for worker in workers),
            sum(worker.get("num_blocks", 0) for worker in workers),
            sum(worker.get("num_running", 0) for worker in workers),
            sum(worker.get("num_waiting", 0) for worker in workers),
            sum(worker.get("num_parked", 0) for worker in workers),
            sum(worker.get("num_parks", 0) for worker in workers),
        )

    def workers(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(self._url, timeout=30) as response:
            found: list[dict[str, Any]] = json.loads(response.read())["workers"]
            return found


def open_handles(pid: int) -> int:
    """0 for a process that is gone."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def referenced(worker: dict[str, Any]) -> int:
    """KV blocks that somebody holds: neither free nor only cached."""
    return int(worker.get("num_blocks", 0) - worker.get("free_blocks", 0) - worker.get("cached_blocks", 0))


def load(arguments: argparse.Namespace, folder: Path) -> Options:
    """`folder`: for a trace's first third three times."""
    third = max(2, round(arguments.rate * arguments.minutes * 20.0))
    trace = folder / "thirds.csv" if arguments.trace else None
    if trace is not None:
        rows = read_trace(Path(arguments.trace))
        write_thirds(repeated(rows, third, 20.0 * arguments.minutes, arguments.gather_s), trace)
    return Options(
        f"http://127.0.0.1:{arguments.port}",
        rate=None if trace else arguments.rate,
        num_requests=THIRDS * third,
        arrivals="trace" if trace else "gamma",
        cv=2.0,
        trace=None if trace is None else str(trace),
        trace_scale=arguments.trace_scale,
        input_tokens="lognormal:150,0.6",
        output_tokens=None if arguments.trace else "lognormal:60,0.6",
        shared_prompts=0 if arguments.trace else 4,
        shared_tokens=64,
        cancel_share=arguments.cancel,
        timeout_s=120.0,
    )


def plots(samples: list[Sample], result: dict[str, Any]) -> list[str]:
    """Everything that must be flat, over minutes."""
    x = [sample.time_s / 60.0 for sample in samples]
    labels = sorted(
        {name for s in samples for name in s.held_mib}, key=lambda n: -samples[-1].held_mib.get(n, 0)
    )
    memory = [Series(name, x, [s.held_mib.get(name, 0.0) for s in samples], "area") for name in labels[:7]]
    whole = [
        Series("held", x, [sum(s.held_mib.values()) for s in samples]),
        Series("resident", x, [sum(s.resident_mib.values()) for s in samples]),
    ]
    t = result["timeline"]
    minutes = [time / 60.0 for time in t["time_s"]]
    ttft = [None if value is None else 1e3 * value for value in t["ttft_median_s"]]
    queue = [
        Series("running", x, [float(s.running) for s in samples]),
        Series("waiting", x, [float(s.waiting) for s in samples]),
        Series("parked", x, [float(s.parked) for s in samples]),
    ]
    return [
        plot("Memory held, MiB", "minutes", memory),
        plot("Memory of all processes, MiB", "minutes", whole),
        plot("File handles", "minutes", [Series("handles", x, [float(s.handles) for s in samples])]),
        plot(
            "Referenced KV blocks", "minutes", [Series("blocks", x, [float(s.busy_blocks) for s in samples])]
        ),
        plot("Requests in the workers", "minutes", queue),
        plot("Median TTFT, ms", "minutes", [Series("TTFT", minutes, ttft)]),
        plot("Output tokens per second", "minutes", [Series("tokens", minutes, t["output_tok_s"])]),
    ]


def latencies(result: dict[str, Any], name: str) -> list[tuple[float, float]]:
    return [
        (request["due_s"], 1e3 * request[name])
        for request in result["requests"]
        if request["outcome"] == "completed" and request[name] is not None
    ]


def resident_columns(one: Trend) -> Row:
    before, after = one.resident or (None, None)
    return {"resident, second third": before, "resident, last third": after}


def rows_of(found: list[Trend]) -> list[Row]:
    return [
        {
            "what": one.name,
            "unit": one.unit,
            "second third": one.before,
            "last third": one.after,
            "per hour": one.per_hour,
            "flat": "yes" if one.flat else "NO",
        }
        | resident_columns(one)
        for one in found
    ]


def notes_of(samples: list[Sample], after: Sample, summary: dict[str, Any], found: list[Trend]) -> list[str]:
    """`after`: once the last request has ended."""
    full = sum(sample.busy_blocks >= FULL * sample.num_blocks for sample in samples) / len(samples)
    return [
        f"{summary['completed']:,} completed, {summary['failed']} failed {summary['errors']}, "
        f"{summary['cancelled']} clients left; output tokens/s {summary['output_tok_s']:.0f}",
        f"KV blocks referenced: at most {max(s.busy_blocks for s in samples)} of {after.num_blocks}, "
        f"at least {FULL:.0%} of them in {full:.0%} of the samples; requests waiting: at most "
        f"{max(s.waiting for s in samples)}, parked at once: at most {max(s.parked for s in samples)}, "
        f"parked in all: {after.parks:,}",
        f"KV blocks referenced after the last request: {after.busy_blocks} of {after.num_blocks}",
        *(
            f"not flat: {one.name}: {one.before:.1f} -> {one.after:.1f} {one.unit}"
            for one in found
            if not one.flat
        ),
    ]


def main() -> int:
    arguments = parse()
    with TemporaryDirectory() as folder, server(arguments) as process:
        options = load(arguments, Path(folder))
        pid = process.pid
        sampler = Sampler(pid, options.url)
        line = LiveLine(options.num_requests)
        run = run_once(options, checked_target(options), line.show, sampler)
        line.clear()
        time.sleep(SETTLE_S)
        after = sampler.look(sampler.samples[-1].time_s + SETTLE_S)
    result = result_of(run)
    summary = result["summary"]
    found = trends(sampler.samples, latencies(result, "ttft_s"), latencies(result, "tpot_s"))
    notes = notes_of(sampler.samples, after, summary, found)
    written = Result(
        name=arguments.name,
        title="Soak: a local cluster under load",
        about=(
            f"`ellm serve` with {arguments.workers} workers on the bundled model, KV pools of "
            f"{arguments.kv_blocks} blocks, {arguments.rate:g} requests/s for {arguments.minutes:g} minutes, "
            f"steps of {arguments.min_step_ms:g} ms at least, requests of {arguments.gather_s:g} s at once, "
            f"from `ellm bench`'s generator on the same machine; every process sampled each {PERIOD_S:g} s. "
            "Means over the second and the last third (the first is warm-up; lengths and gaps of a trace are "
            "the same in each), and the slope between. Memory is "
            "what a process holds, anonymous and shared; beside it all that is resident, with the pages of "
            "files, which the system reads in and drops as it likes (those that several processes use count "
            "in each)."
        ),
        command=command_line("ellm.loadtest.soak"),
        rows=rows_of(found),
        notes=notes,
        raw={"samples": [asdict(sample) for sample in sampler.samples], "summary": summary},
    )
    path = written.write()
    html = Path(arguments.html) if arguments.html else RESULTS / f"{path.stem}.html"
    html.write_text(page_of(written.title, written.about, [("", notes)], plots(sampler.samples, result)))
    print("\n".join([*notes, f"wrote {path} and {html}"]))
    return int(bool(after.busy_blocks or summary["failed"] or not all(one.flat for one in found)))


if __name__ == "__main__":
    raise SystemExit(main())
