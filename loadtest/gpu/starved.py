"""Scheduling policies beside each other on a GPU whose KV pool holds a third of the context that is offered.

    python -m ellm.loadtest.gpu.starved --out starved.json [--literal 0.25 0.5 0.75]

What `ellm.loadtest.starved_pool` does on a CPU, with lengths as ShareGPT's: the same arrivals through every
policy in one run, ends that the engine cannot foresee, equal tokens throughout (STRICT), the simulator beside
each run, and the cost model's p50 and p95 on steps that it was not fitted on (aim: within 10 %).
`literal(r)` leaves the share r of each context uncached: the sweep over r. Without a GPU:

    python -m ellm.loadtest.gpu.starved --device cpu --tiny
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ellm.loadtest import starved_pool
from ellm.loadtest.gpu.models import SHAPES, make_model
from ellm.loadtest.gpu.timing import aim, unmeasured, write
from ellm.loadtest.open_loop import run_open_loop
from ellm.loadtest.sim.metrics import measure
from ellm.loadtest.starved_pool import BLOCK, POLICIES, config_of, load, offer, run_all
from ellm.loadtest.starved_rows import BASELINE, OURS
from ellm.loadtest.step_fit import notes_of
from ellm.loadtest.unforeseen import check_tokens, peak_context

SHARE = 3  # of the context that is offered the pool holds one part in so many


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Raises AssertionError where a policy says something else than a roomy pool."""
    mean = args.prompt + args.output / 2
    alone = -(-(4 * args.prompt + args.cap) // BLOCK) + 1  # the longest request must fit alone
    args.pool_blocks = max(alone, int(args.max_num_seqs * mean / SHARE) // BLOCK)
    offered, rate, slo_s, step_s = offer(args)
    roomy_blocks = min(args.requests, args.max_num_seqs) * -(-(4 * args.prompt + args.cap) // BLOCK)
    roomy = run_open_loop(
        load(config_of(args, "full-chunked", roomy_blocks, 0)), offered.requests(slo_s), offered.arrivals
    )
    check_tokens(roomy, offered, "roomy")
    peak = peak_context(offered.prompts, roomy.token_times)
    least = -(-(max(map(len, offered.prompts)) + args.cap) // BLOCK) + 1  # one request must fit alone
    args.pool_blocks = max(least, int(peak / SHARE) // BLOCK)
    args.transient_blocks = args.pool_blocks // 2
    print(f"pool {BLOCK * args.pool_blocks} tokens of {peak:.0f} offered, {rate:.2f} requests/s", flush=True)
    args.policies = [*args.policies, *(f"literal({share:g})" for share in args.literal)]
    rows, raw = run_all(args, offered, slo_s)
    left_out = [f"not run, for want of time: {', '.join(raw['left_out'])}"] if raw["left_out"] else []
    return {
        "rows": rows,
        "aims": aims(raw),
        "notes": [*notes_of(raw), *left_out],
        "step_errors": {run["policy"]: run["step_errors"] for run in raw["runs"]},
        "pool_tokens": BLOCK * args.pool_blocks,
        "offered_peak_tokens": peak,
        "rate": rate,
        "full_step_s": step_s,
        "tpot_slo_s": slo_s,
        "roomy": asdict(measure(offered.arrivals, roomy.token_times, slo_s)),
        "raw": raw,
    }


def aims(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The cost model's p50 and p95 of held-out steps within 10 %, as 1 less the error."""
    made = [
        aim(f"{run['policy']}, {kind}: cost model's {q}", 1.0 - abs(errors[f"{q}_error"]), 0.9)
        for run in raw["runs"]
        for kind, errors in run["step_errors"].items()
        for q in ("p50", "p95")
    ]
    unfit = [run["policy"] for run in raw["runs"] if not run["step_errors"]]
    made += [unmeasured(f"{policy}: cost model", "too few steps to hold some out") for policy in unfit]
    left_out = "not run, for want of time"
    return made + [unmeasured(f"{policy}: cost model", left_out) for policy in raw["left_out"]]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(**starved_pool.CPU)
    add = parser.add_argument
    add("--device", default="cuda")
    add("--checkpoint", default="qwen3-0.6b", choices=list(SHAPES))
    add("--models", type=Path, default=Path(".cache/gpu-models"), help="where checkpoints are, or are made")
    add("--dtype", default="bfloat16")
    add("--threads", type=int, default=4)
    add("--requests", type=int, default=80)
    add("--prompt", type=int, default=222, help="mean prompt tokens")
    add("--output", type=int, default=1346, help="mean output tokens")
    add("--cap", type=int, default=4096, help="max_tokens of every request")
    add("--max-num-seqs", type=int, default=128)
    add("--max-step-tokens", type=int, default=2048)
    add("--host-mib", type=int, default=4096)
    add("--load", type=float, default=1.0, help="share of what the starved pool can serve")
    add("--cv", type=float, default=1.7)
    add("--slo-ratio", type=float, default=2.0, help="SLO over a step with a full pool")
    add("--policies", nargs="+", default=list(POLICIES), metavar="POLICY")
    add("--literal", type=float, nargs="*", default=[0.25, 0.5, 0.75], metavar="R", help="uncached shares")
    add("--seed", type=int, default=0)
    add("--limit-s", type=float, help="policies that would end later are left out")
    add("--tiny", action="store_true", help="a tiny model, few requests: shows that it works")
    add("--out", default="starved.json")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    vars(args).update(hosts=("on",), deterministic=True, temperature=1.0)
    args.until = None if args.limit_s is None else begun + args.limit_s
    if args.tiny:
        vars(args).update(checkpoint="tiny", dtype="float32", threads=1, requests=12, prompt=20, output=24)
        vars(args).update(cap=100, max_num_seqs=8, max_step_tokens=64, host_mib=4, literal=[0.5])
        # Blocks that are half empty are most of so small a pool.
        vars(args).update(policies=[BASELINE, OURS], full=0.4, load=3.0)
    args.vocab = SHAPES[args.checkpoint]["vocab_size"]
    args.model = make_model(args.checkpoint, args.models, args.device)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    found = run(args)
    write(args.out, torch.device(args.device), vars(args), **found)


if __name__ == "__main__":
    main()
