"""Seconds from scale-up to the first token, by phase, on a cluster that grows under load and shrinks again.

    python -m ellm.loadtest.scale_up [--cycles 3] [--models small,large]

`ellm serve` with one worker that may become two. Streams, more at a time than one worker runs, make the
controller ask for the second; they end when it has answered, but for one stream, which outlives its going.
Each time is what somebody outside sees first: `/metrics`, the processes, `/admin/workers`, the first byte of
an answer that a timeline says is the new worker's. Within the start the worker's own account (`start_s`) is
taken. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from ellm.loadtest.bench_checkpoint import SHAPE, make_checkpoint
from ellm.loadtest.chaos_client import learn, make_templates
from ellm.loadtest.result import Result, Row, command_line
from ellm.loadtest.scale_up_watch import Load, Outside, first_token_of, when
from ellm.loadtest.served import SERVE, started

BUNDLED = Path(__file__).parent.parent / "deploy" / "bundled" / "pydoc-5m"
LARGE = {
    **SHAPE, "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 4, "intermediate_size": 2816,
}  # fmt: skip
MODELS = {"small": "the bundled model, 5M", "large": "a random Llama, 137M"}
MAX_RUNNING = 8  # sequences of a worker
DOWN_S, COOL_S = 10.0, 5.0

ABOUT = """\
`ellm serve` on one machine: a worker of {running} sequences at most, which may become two, and {streams}
streams of {tokens} tokens or a few more at a time; when the new worker has answered, one stream is left until
it has gone again. The controller's `up_after_s` is 2 s (the default), `down_after_s` 10 s and `cool_down_s`
5 s, so that it takes minutes. A phase begins where the one above it ends; seconds are medians of {cycles}
times, the least and the most beside them. `first worker`: the same phases of the worker with which the server
came up, without any load. All of it runs on the cores that serve meanwhile. A request is lost if its stream
does not end in [DONE] or its text is not that of an undisturbed server."""

# What is told of a worker's own phases (worker/start_times.py), in words that say whose time it is.
OURS = {
    "process": "process: its supervisor's and its own, until it loads",
    "importing torch": "process: importing torch",
    "loading weights": "weights",
    "warming up": "warm-up: every kind of step once, and the KV pool",
    "recording decode steps": "warm-up: CUDA graphs",
    "finishing": "warm-up: engine and ports",
    "measuring steps": "warm-up: measuring steps for the cost model",
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=3, help="up and down again, of each model")
    parser.add_argument("--models", default="small,large", help="of small, large")
    parser.add_argument("--streams", type=int, default=16, help="at a time")
    parser.add_argument("--tokens", type=int, default=48, help="of each stream")
    parser.add_argument("--port", type=int, default=8175)
    parser.add_argument("--name", default="scale-up", help="slug of the result file; empty: none is written")
    return parser.parse_args(argv)


@dataclass(slots=True)
class Cycle:
    """Times of `time.monotonic`, and the new worker's own account."""

    loaded_at: float
    decided_at: float = 0.0
    supervisor_at: float = 0.0
    found_at: float = 0.0
    first_token_at: float = 0.0
    idle_at: float = 0.0
    down_at: float = 0.0  # it was decided
    gone_at: float = 0.0
    start_s: dict[str, float] = field(default_factory=dict)
    num_answers: int = 0
    lost: list[str] = field(default_factory=list)

    def phases(self) -> dict[str, float]:
        """Seconds of each, in order."""
        own = {OURS.get(phase, phase): seconds for phase, seconds in self.start_s.items()}
        found_s = self.found_at - self.supervisor_at - sum(own.values())
        return {
            "load until the controller decides": self.decided_at - self.loaded_at,
            "process: Serve starts its supervisor": self.supervisor_at - self.decided_at,
            **own,
            "until a router has found it": found_s,
            "until its first token": self.first_token_at - self.found_at,
            "from the decision to the first token": self.first_token_at - self.decided_at,
            "idle until the controller decides": self.down_at - self.idle_at,
            "from the decision until it has gone": self.gone_at - self.down_at,
        }


def one_cycle(outside: Outside, load: Load) -> Cycle:
    """`load` has just begun, on one worker."""
    before = {row["epoch"] for row in outside.workers()}
    cycle = Cycle(time.monotonic())
    with load:
        cycle.decided_at = when("the decision", lambda: outside.wanted() == 2)
        cycle.supervisor_at = when("its supervisor", lambda: outside.num_supervisors() == 2)
        cycle.found_at = when("the second worker", lambda: len(outside.workers()) == 2)
        (new,) = (row for row in outside.workers() if row["epoch"] not in before)
        cycle.start_s = new["start_s"]
        when("its first answer", lambda: first_token_of(new["id"], outside, load, cycle.supervisor_at))
        load.busy.clear()
        cycle.idle_at = time.monotonic()
        cycle.down_at = when("the second decision", lambda: outside.wanted() == 1)
        cycle.gone_at = when(
            "its end", lambda: len(outside.workers()) == 1 and outside.num_supervisors() == 1
        )
    # Another may have begun before it and ended later.
    cycle.first_token_at = first_token_of(new["id"], outside, load, cycle.supervisor_at)
    cycle.num_answers, cycle.lost = len(load.answers), load.lost()
    return cycle


def words_of(model: Path, arguments: argparse.Namespace) -> list[str]:
    """Of the command."""
    settings = (
        "min_workers=1", "max_workers=2", f"worker.scheduler.max_num_seqs={MAX_RUNNING}",
        f"controller.scaling.down_after_s={DOWN_S:g}", f"controller.scaling.cool_down_s={COOL_S:g}",
        "worker.cache.num_blocks=2048",
    )  # fmt: skip
    flags = [word for setting in settings for word in ("--set", setting)]
    return ["serve", str(model), "--workers", "1", "--port", str(arguments.port), *flags]


def measure(model: Path, arguments: argparse.Namespace) -> tuple[dict[str, float], list[Cycle]]:
    """The first worker's account of its start, and what every cycle brought."""
    with started(SERVE, words_of(model, arguments)) as server:
        outside = Outside(server)
        address = urlsplit(server.url)
        host, port = str(address.hostname), int(address.port or 0)
        when("the first worker", lambda: len(outside.workers()) == 1)
        (first,) = outside.workers()
        templates = make_templates(64, arguments.tokens, seed=0, model=first["model"])
        asyncio.run(learn(host, port, templates, at_once=2))
        cycles = []
        for index in range(arguments.cycles):
            time.sleep(2 * COOL_S)  # what has just changed is left alone for so long
            cycle = one_cycle(outside, Load(host, port, templates, arguments.streams))
            print(f"cycle {index + 1}: {json.dumps(cycle.phases())}, {len(cycle.lost)} lost", flush=True)
            cycles.append(cycle)
    return first["start_s"], cycles


def rows_of(model: str, first: dict[str, float], cycles: list[Cycle]) -> list[Row]:
    """A row a phase."""
    alone = {OURS.get(phase, phase): seconds for phase, seconds in first.items()}
    each = [cycle.phases() for cycle in cycles]
    rows: list[Row] = []
    for phase in dict.fromkeys(phase for one in each for phase in one):
        seconds = [one[phase] for one in each if phase in one]
        rows.append(
            {
                "model": model,
                "phase": phase,
                "s": statistics.median(seconds),
                "least": min(seconds),
                "most": max(seconds),
                "first worker, s": alone.get(phase),
            }
        )
    return rows


def folder_of(model: str, scratch: Path) -> Path:
    """The large one has the small one's tokenizer: their vocabularies have one size."""
    if model == "small":
        return BUNDLED
    folder = make_checkpoint(scratch / "llama-137m", shape=LARGE)
    for file in BUNDLED.glob("*token*.json"):
        shutil.copy(file, folder)
    return folder


def result_of(arguments: argparse.Namespace, rows: list[Row], notes: list[str], raw: object) -> Result:
    return Result(
        name=arguments.name,
        title="From scale-up to the first token",
        about=ABOUT.format(
            running=MAX_RUNNING, streams=arguments.streams, tokens=arguments.tokens, cycles=arguments.cycles
        ),
        command=command_line("ellm.loadtest.scale_up"),
        rows=rows,
        notes=notes,
        raw=raw,
    )


def main() -> int:
    arguments = parse()
    rows: list[Row] = []
    notes, raw, lost = [], {}, 0
    with tempfile.TemporaryDirectory() as scratch:
        for model in arguments.models.split(","):
            load = os.getloadavg()[0]  # of others
            first, cycles = measure(folder_of(model, Path(scratch)), arguments)
            rows += rows_of(MODELS[model], first, cycles)
            count, gone = sum(cycle.num_answers for cycle in cycles), sum(len(cycle.lost) for cycle in cycles)
            notes.append(f"{MODELS[model]}: {count} answers, {gone} lost; load average before it {load:.1f}")
            raw[model] = [{"phases": c.phases(), "start_s": c.start_s, "lost": c.lost} for c in cycles]
            lost += gone
            if arguments.name:  # after each: what there is, is kept
                print(f"wrote {result_of(arguments, rows, notes, raw).write()}")
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
