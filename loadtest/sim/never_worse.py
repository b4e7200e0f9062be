"""Is one policy ever worse than the best baseline? A thinned grid of models, GPUs, loads, SLOs and arrivals.

    python -m ellm.loadtest.sim.never_worse --points 54 --jobs 2 --resume runs.jsonl

Of all combinations every second one is taken, like the squares of one colour of a chessboard, so that each
pair of values meets; `--points` takes the first so many of them in a fixed random order. A point is lost in
goodput below 0.99 of the best baseline, and in time to first token above 1.1 times its own + 50 ms where it
attains 0.97 of its SLOs and the SLO is at least 1.3 steps at full memory. What a loss comes from is not
found here: it is looked at by hand and stands in results/causes/never-worse.json, by "model, GPU, load,
SLO/T, cv, host". Points that were found to be hard elsewhere are always among them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from random import Random

from ellm.loadtest.result import RESULTS, Result, Row
from ellm.loadtest.sim.run import means
from ellm.loadtest.sim.setting import Setting
from ellm.loadtest.sim.sweep import TURNS, Figures, Point, num_places, run_all

POLICY = "adaptive"
BASELINES = ["full-recompute", "full-chunked", "full-offload", "full-predictive"]
MODELS = ["llama2-13b", "llama3-8b", "qwen3-32b"]
GPUS = ["a100-80g", "h200"]
LOADS = [0.5, 0.9, 1.2]
SLO_RATIOS = [1.1, 1.7, 4.0]
CVS = [1.0, 4.0]
LEAST_RATIO = 0.99
MIN_REQUESTS = 400
HARD = [("llama2-13b", "a100-80g", 0.9, 1.7, 4.0, 0.0)]  # with the host tier in GB
CAUSES = RESULTS / "causes" / "never-worse.json"


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    points = [*chessboard(args.host_gb)[: args.points], *(make_point(*hard) for hard in HARD)]
    policies = [POLICY, *BASELINES]
    tasks = [(p.setting, policy, seed) for p, policy, seed in product(points, policies, args.seeds)]
    figures = run_all(tasks, Path(args.resume) if args.resume else None, args.jobs)
    by_task = dict(zip(tasks, figures, strict=True))
    causes: dict[str, str] = json.loads(CAUSES.read_text())
    rows = [
        judge(point, {p: [by_task[point.setting, p, seed] for seed in args.seeds] for p in policies})
        for point in points
    ]
    rows.sort(key=lambda row: (not is_lost(row), min(row["ratio"], row["ratio TTFT"] or 1.0)))
    for row in rows:
        row["cause"] = causes.get(name(row))
    lost = sum(is_lost(row) for row in rows)
    result = Result(
        name="sim-never-worse",
        title=f"Never worse: {POLICY} against the best baseline, simulated",
        about=f"{len(points)} points of {len(MODELS)} models, {len(GPUS)} GPUs, loads (shares of capacity), "
        "SLOs (multiples of a step at full memory) and variations of arrivals, the worst first; "
        f"{lost} of them are lost, by goodput (mean-TPOT definition) below {LEAST_RATIO:g} of the best of "
        f"{', '.join(BASELINES)}, or by mean time to first token above 1.1 times the best baseline's + 50 ms "
        "where that attains 0.97 and SLO/T is 1.3 or more (`ratio TTFT` is what is allowed over what it is). "
        "`ratio window` leaves out the first tenth of the arrivals. A host tier counts for those who have a "
        f"use for it. max_num_seqs 256, watermark 0.01, seeds {', '.join(map(str, args.seeds))}.",
        command=f"python -m ellm.loadtest.sim.never_worse --points {args.points} --host-gb {args.host_gb:g} "
        f"--seeds {' '.join(map(str, args.seeds))}",
        rows=rows,
        seed=args.seeds[0],
        raw=[
            {"setting": asdict(setting), "policy": policy, "seed": seed, **by_task[setting, policy, seed]}
            for setting, policy, seed in tasks
        ],
    )
    print(f"{lost} of {len(rows)} points are lost; wrote {result.write()}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--points", type=int, default=54, help="the first so many (default: all 54)")
    add("--seeds", nargs="+", type=int, default=[1])
    add("--host-gb", type=float, default=64.0)
    add("--jobs", type=int, default=1)
    add("--resume", metavar="FILE", help="keep finished runs here, and do not repeat them")
    return parser


def chessboard(host_gb: float) -> list[Point]:
    """Every second combination, in a fixed random order."""
    points = []
    for (i, model), (j, gpu), (k, load), (m, ratio), (n, cv) in product(
        enumerate(MODELS), enumerate(GPUS), enumerate(LOADS), enumerate(SLO_RATIOS), enumerate(CVS)
    ):
        if (i + j + k + m + n) % 2:
            continue
        points.append(make_point(model, gpu, load, ratio, cv, host_gb))
    Random(0).shuffle(points)
    return points


def make_point(model: str, gpu: str, load: float, ratio: float, cv: float, host_gb: float) -> Point:
    base = Setting(model=model, gpu=gpu, load=load, cv=cv, host_gb=host_gb)
    setting = replace(
        base,
        num_requests=max(MIN_REQUESTS, TURNS * num_places(base)),
        tpot_slo_ms=1000 * ratio * base.device.full_step_s,
    )
    return Point(setting, ratio)


def judge(point: Point, runs: dict[str, list[Figures]]) -> Row:
    """One row: ours beside the best baseline, by mean goodput."""
    mean = {policy: means(many) for policy, many in runs.items()}
    ours = mean[POLICY]
    best = max(BASELINES, key=lambda policy: mean[policy]["goodput_tok_s"])
    theirs = mean[best]
    window = max(mean[policy]["window"]["goodput_tok_s"] for policy in BASELINES)
    counts = theirs["slo_attainment"] >= 0.97 and point.slo_ratio >= 1.3
    allowed = 1.1 * theirs["ttft_mean_s"] + 0.05
    return {
        **point.columns,
        "host": f"{point.setting.host_gb:g} GB",
        "requests": point.setting.num_requests,
        "goodput": ours["goodput_tok_s"],
        "SLO": ours["slo_attainment"],
        "TTFT, s": ours["ttft_mean_s"],
        "best": theirs["goodput_tok_s"],
        "best SLO": theirs["slo_attainment"],
        "best TTFT, s": theirs["ttft_mean_s"],
        "ratio": _over(ours["goodput_tok_s"], theirs["goodput_tok_s"]),
        "ratio window": _over(ours["window"]["goodput_tok_s"], window),
        "ratio TTFT": min(1.0, allowed / ours["ttft_mean_s"]) if counts else None,
        "against": best,
    }


def is_lost(row: Row) -> bool:
    return row["ratio"] < LEAST_RATIO or (row["ratio TTFT"] or 1.0) < 1.0


def name(row: Row) -> str:
    return ", ".join(str(row[key]) for key in ("model", "gpu", "load", "SLO/T", "cv", "host"))


def _over(ours: float, theirs: float) -> float:
    return round(ours / theirs, 3) if theirs > 0.0 else 1.0  # what is nearer is equal


if __name__ == "__main__":
    raise SystemExit(main())
