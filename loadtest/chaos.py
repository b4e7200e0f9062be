"""Everything that can break, broken under load: clients must notice a pause at most.

    python -m ellm.loadtest.chaos [--each 5] [--streams 64] [--model PATH] [--kinds KIND,...]

A real Ray cluster of several nodes on this machine; workers on a small CPU model under STRICT, one of them a
group of two ranks; two routers behind HAProxy. Requests come by the clock and are never repeated; real
processes are killed and frozen in random order; every stream is compared with the undisturbed answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ellm.loadtest.chaos_client import OpenLoop, Template, learn, make_templates, with_stops
from ellm.loadtest.chaos_cluster import ChaosCluster, ChaosSetting, set_environment, wait_until
from ellm.loadtest.chaos_faults import Fault, Faults
from ellm.loadtest.chaos_verdict import against_plan, by_kind, judge, notes_of, passed
from ellm.loadtest.result import Result, command_line
from ellm.router.config import RouterConfig
from ellm.worker.api.config import (
    SIMULATED,
    CacheConfig,
    ModelConfig,
    SchedulerConfig,
    WorkerConfig,
    served_name,
)

TOKENIZER = Path(__file__).parent.parent / "deploy" / "bundled" / "pydoc-5m"
SETTLE_S = 3.0  # between two faults
KINDS = (
    "kill_rank", "kill_follower", "kill_supervisor", "kill_router", "kill_controller", "kill_raylet",
    "stop_rank", "silent_node", "drain", "rolling_update",
)  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=5, help="how often each kind of fault is applied")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--streams", type=int, default=64, help="that are open at a time, about")
    parser.add_argument("--tokens", type=int, default=128, help="output tokens of a request, at least")
    parser.add_argument(
        "--step-ms", type=float, default=60.0, help="a step of a worker takes so long at least"
    )
    parser.add_argument("--min-streams", type=int, default=8, help="past their first token, of a victim")
    parser.add_argument("--min-requests", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=240.0, help="no fault begins after so long")
    parser.add_argument("--model", default=str(TOKENIZER), help="a checkpoint, or simulated:...")
    parser.add_argument("--templates", type=int, default=48)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--workers", type=int, default=3, help="of one rank")
    parser.add_argument("--pairs", type=int, default=1, help="workers of two ranks")
    parser.add_argument("--routers", type=int, default=2)
    parser.add_argument(
        "--policy", default=RouterConfig().policy, help="of routing; the product's by default"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="chaos", help="slug of the result file; empty: none is written")
    return parser.parse_args(argv)


def setting(args: argparse.Namespace) -> ChaosSetting:
    simulated = args.model.startswith(SIMULATED)
    config = WorkerConfig(
        model=ModelConfig(path=args.model, dtype="auto" if simulated else "float32", device="cpu"),
        cache=CacheConfig(num_blocks=1024),
        scheduler=SchedulerConfig(max_num_seqs=64, max_step_tokens=512),
        num_threads=1,
        profile=False,
        stall_s=5.0,
        drain_timeout_s=3.0,
        min_step_s=args.step_ms / 1000,
    )
    tokenizer = str(TOKENIZER) if simulated else None
    return ChaosSetting(config, args.nodes, args.workers, args.pairs, args.routers, tokenizer, args.policy)


async def learned(cluster: ChaosCluster, args: argparse.Namespace) -> list[Template]:
    """The templates, and what an undisturbed server says to them."""
    model = served_name(cluster.setting.config.model)
    templates = make_templates(args.templates, args.tokens, args.seed, model)
    await learn("127.0.0.1", cluster.port, templates, args.streams // 2)
    templates += with_stops(templates)
    await learn("127.0.0.1", cluster.port, templates, args.streams)  # and once more, in another company
    return templates


def disturb(cluster: ChaosCluster, args: argparse.Namespace) -> tuple[OpenLoop, list[Fault]]:
    """The whole run: learn the answers, then faults under load. Ray wants its nodes to be started by the main
    thread: the load has a thread of its own."""
    templates = asyncio.run(learned(cluster, args))
    tokens = statistics.mean(t.body["max_tokens"] for t in templates)
    choices = statistics.mean(t.body.get("n", 1) for t in templates)
    rate = args.streams / (tokens * choices * args.step_ms / 1000)
    print(f"{len(templates)} templates; {rate:.1f} requests/s", flush=True)
    loop = OpenLoop("127.0.0.1", cluster.port, templates, rate, args.seed)
    over = threading.Event()
    load = threading.Thread(target=lambda: asyncio.run(loop.run(over.is_set)))
    load.start()
    try:
        applied = apply_all(cluster, loop, args)
        while len(loop.answers) + loop.num_open < args.min_requests:
            time.sleep(0.5)
    finally:
        over.set()
        load.join()
    return loop, applied


def apply_all(cluster: ChaosCluster, loop: OpenLoop, args: argparse.Namespace) -> list[Fault]:
    """Every kind of fault as often as asked for, one after the other: each round in an order of its own."""
    faults = Faults(cluster, args.min_streams)
    rng, kinds = random.Random(args.seed), args.kinds.split(",")
    order = [kind for _ in range(args.each) for kind in rng.sample(kinds, len(kinds))]
    applied: list[Fault] = []
    retries = 2 * len(order)
    until = time.monotonic() + 60 * args.minutes
    while order and time.monotonic() < until:
        kind = order.pop(0)
        try:
            fault = faults.apply(kind)
        except TimeoutError as error:  # no worker has enough streams now: later, then
            retries -= 1
            print(f"{kind} is put off: {error}; {faults.state()}", flush=True)
            if not retries:
                raise
            order.append(kind)
            continue
        applied.append(fault)
        errors = [a.error for a in loop.answers if a.error]
        took_s = fault.recovered_s and round(fault.recovered_s, 1)
        print(
            f"{len(applied)}/{len(applied) + len(order)} {fault.kind} on {fault.victim} "
            f"with {fault.streams} streams: whole after {took_s} s {fault.remarks}; "
            f"{len(loop.answers)} requests, {len(errors)} failed {errors[-3:]}",
            flush=True,
        )
        time.sleep(SETTLE_S)
    return applied


def leaks(cluster: ChaosCluster) -> dict[str, Any]:
    """Once nothing is asked any more: blocks that are neither free nor cached, sequences, other ranks."""

    def idle() -> bool:
        rows = cluster.ready_rows()
        return len(rows) == cluster.setting.num_workers and not any(_held(row) for row in rows)

    with contextlib.suppress(TimeoutError):
        wait_until(idle, 20)
    rows = cluster.ready_rows()
    return {
        "leaked blocks": sum(row["num_blocks"] - row["free_blocks"] - row["cached_blocks"] for row in rows),
        "live sequences": sum(_held(row) for row in rows),
        "leaked ranks": len(cluster.leaked_ranks()),
        "workers at the end": len(rows),
    }


def _held(row: dict[str, Any]) -> int:
    used = row["num_blocks"] - row["free_blocks"] - row["cached_blocks"]
    return int(row["num_running"] + row["num_waiting"] + row["num_parked"] + used + row["num_here"])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verdict; needs a process in which Ray was not imported yet."""
    set_environment()
    start = time.monotonic()
    with ChaosCluster(setting(args)) as cluster:
        print(
            f"ready after {time.monotonic() - start:.0f} s: {[r['id'] for r in cluster.rows()]}", flush=True
        )
        load = [os.getloadavg()[0]]
        loop, faults = disturb(cluster, args)
        load.append(os.getloadavg()[0])
        verdict = judge(loop, loop.templates, faults) | leaks(cluster)
        verdict["workers at the start"] = cluster.setting.num_workers
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not cluster.left_behind(), 20)
    verdict["leaked processes"] = [list(found) for found in cluster.left_behind()]
    verdict["recovered"] = all(fault.recovered_s is not None for fault in faults)
    verdict["seconds"] = round(time.monotonic() - start)
    verdict["load average"] = load
    verdict["faults"] = [fault.to_dict() for fault in faults]
    verdict["rows"] = by_kind(loop, faults)
    return verdict | against_plan(verdict["rows"], faults, dict.fromkeys(args.kinds.split(","), args.each))


def main() -> int:
    args = parse()
    verdict = run(args)
    rows = verdict.pop("rows")
    print(json.dumps({key: value for key, value in verdict.items() if key != "faults"}, indent=1))
    if args.name:
        path = Result(
            name=args.name,
            title="Chaos: what clients notice when things break",
            about=" ".join(__doc__.split("\n\n")[2].split()),
            command=command_line("ellm.loadtest.chaos"),
            rows=rows,
            seed=args.seed,
            notes=notes_of(verdict, args.tokens),
            raw=verdict,
        ).write()
        print(f"wrote {path}")
    return 0 if passed(verdict) else 1


if __name__ == "__main__":
    sys.exit(main())
