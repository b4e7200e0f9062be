"""Goodput over SLOs, all policies, in the overload setting: the curve that stands beside every headline.

    python -m ellm.loadtest.sim.curve --seeds 1 2 3 --jobs 2 --plot docs/goodput-over-slo.png

A policy that never looks at the SLO does the same whatever it is: it is simulated once and measured at each.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from ellm.loadtest.result import Result, Row, command_line
from ellm.loadtest.sim.headline import HOST_GB, OURS, OVERLOAD, UNTUNED, WITH_HOST
from ellm.loadtest.sim.metrics import measure
from ellm.loadtest.sim.plots import check_plot, plot_curves
from ellm.loadtest.sim.replica import Replica
from ellm.loadtest.sim.run import make_core, make_executor
from ellm.loadtest.sim.setting import Setting, offer

SLOS_MS = [45.0, 50.0, 60.0, 75.0, 100.0, 150.0]
POLICIES = [OURS, *UNTUNED, *WITH_HOST, "full-recompute(max_num_seqs=40)"]
LOOKS = (OURS, "full-predictive")  # at the SLO

Curve = dict[float, dict[str, float]]  # SLO in ms -> figures
Task = tuple[Setting, str, int, list[float]]


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if args.plot:
        check_plot(args.plot)
    base = replace(OVERLOAD, host_gb=HOST_GB, num_requests=args.num_requests)
    tasks: list[Task] = []
    for policy, seed in product(POLICIES, args.seeds):
        groups = [[slo] for slo in SLOS_MS] if policy in LOOKS else [SLOS_MS]
        tasks += [(base, policy, seed, slos) for slos in groups]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        curves = list(pool.map(_run, tasks))
    raw: list[dict[str, Any]] = [
        {"setting": {**asdict(base), "tpot_slo_ms": slo}, "policy": policy, "seed": seed, **figures}
        for (_, policy, seed, _), curve in zip(tasks, curves, strict=True)
        for slo, figures in curve.items()
    ]
    result = Result(
        name="sim-goodput-over-slo",
        title="Goodput over the SLO, simulated",
        about=f"The overload setting with {base.num_requests} requests: goodput (tokens per second of those "
        f"whose mean TPOT keeps the SLO), means over seeds {', '.join(map(str, args.seeds))}; a step at full "
        f"memory takes {1e3 * base.device.full_step_s:.1f} ms; host {HOST_GB:g} GB for {OURS}, "
        f"{' and '.join(WITH_HOST)}. `ratio` is {OURS} over the best other column.",
        command=command_line("ellm.loadtest.sim.curve"),
        rows=[_row(raw, slo) for slo in SLOS_MS],
        seed=args.seeds[0],
        raw=raw,
    )
    if args.plot:
        load = fmean(offer(base, seed).load for seed in args.seeds)
        plot_curves([{**one, "setting": {**one["setting"], "load": load}} for one in raw], args.plot)
        result.notes.append(f"drawn: [{Path(args.plot).name}]({Path(args.plot).name})")
    print(f"wrote {result.write()}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-requests", type=int, default=600)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--plot", metavar="FILE", help="in docs/; needs matplotlib")
    return parser


def goodput_curve(setting: Setting, policy: str, seed: int, slos_ms: Sequence[float]) -> Curve:
    """One run with the first of `slos_ms`, measured at each of them."""
    setting = replace(setting, tpot_slo_ms=slos_ms[0], host_gb=setting.host_gb if _uses_host(policy) else 0.0)
    requests = offer(setting, seed).requests
    core, executor = make_core(setting, policy), make_executor(setting, requests)
    trajectory = Replica(core, executor, requests, tpot_slo_s=slos_ms[0] / 1000).run()
    arrivals = [request.arrival_s for request in requests]
    curve: Curve = {}
    for slo_ms in slos_ms:
        one = measure(arrivals, trajectory.token_times, slo_ms / 1000)
        curve[slo_ms] = {
            "goodput_tok_s": one.goodput_tok_s,
            "slo_attainment": one.slo_attainment,
            "goodput_strict_tok_s": one.goodput_strict_tok_s,
        }
    return curve


def _uses_host(policy: str) -> bool:
    return policy in (OURS, *WITH_HOST)


def _run(task: Task) -> Curve:
    return goodput_curve(*task)


def _row(raw: list[dict[str, Any]], slo_ms: float) -> Row:
    here = [one for one in raw if one["setting"]["tpot_slo_ms"] == slo_ms]
    goodput = {
        policy: fmean(one["goodput_tok_s"] for one in here if one["policy"] == policy) for policy in POLICIES
    }
    best = max((policy for policy in POLICIES if policy != OURS), key=lambda policy: goodput[policy])
    return {
        "SLO, ms": f"{slo_ms:g}",
        "SLO/T": f"{slo_ms / 1000 / OVERLOAD.device.full_step_s:.2f}",
        **goodput,
        f"SLO of {OURS}": fmean(one["slo_attainment"] for one in here if one["policy"] == OURS),
        "ratio": goodput[OURS] / goodput[best],
        "against": best,
    }


if __name__ == "__main__":
    raise SystemExit(main())
