"""A grid of settings: our policy against the baselines at every point, several seeds each.

    python -m ellm.loadtest.sim.sweep --loads 0.5 0.9 1.1 1.5 --slo-ratios 1.1 1.7 4 --seeds 1 2 3 --jobs 2

The SLO of a point is a multiple of its step time at full memory, and its load a share of its capacity, so
that points of different models and GPUs can be compared. A run has at least four times as many requests as
have room at once. Finished runs are kept in a file (`--resume`), and a sweep that was cut off goes on from
there: start a new file when the engine has changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import ceil
from pathlib import Path
from time import monotonic
from typing import Any

from ellm.loadtest.result import Result, Row, command_line
from ellm.loadtest.sim.metrics import context_read
from ellm.loadtest.sim.plots import check_plot, plot_curves
from ellm.loadtest.sim.run import Task, means, prepare, run_tasks
from ellm.loadtest.sim.setting import Setting
from ellm.loadtest.sim.workload import make_requests
from ellm.worker.api.errors import ConfigError

BASELINES = ["full-recompute", "full-swap", "full-chunked", "full-offload", "full-predictive"]
TURNS = 4  # requests per place

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of the grid."""

    setting: Setting
    slo_ratio: float  # SLO / step at full memory

    @property
    def columns(self) -> Row:
        s = self.setting
        return {
            "model": s.model,
            "gpu": s.gpu,
            "load": f"{s.load:g}",
            "SLO/T": f"{self.slo_ratio:g}",
            "cv": f"{s.cv:g}",
        }


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        return _sweep(args)
    except ConfigError as error:
        print(error.message, file=sys.stderr)
        return 2


def _sweep(args: argparse.Namespace) -> int:
    if args.plot:
        check_plot(args.plot)
    points = list(grid(args))
    policies = [args.policy, *args.baselines]
    for point in points:
        prepare(point.setting, policies, args.seeds[:1])
    tasks = [(p.setting, policy, seed) for p, policy, seed in product(points, policies, args.seeds)]
    figures = run_all(tasks, Path(args.resume) if args.resume else None, args.jobs)
    by_task = dict(zip(tasks, figures, strict=True))
    rows = [
        compare(
            point,
            args.policy,
            {policy: [by_task[point.setting, policy, seed] for seed in args.seeds] for policy in policies},
        )
        for point in points
    ]
    result = Result(
        name=args.name,
        title=f"{args.policy} against the best baseline, simulated",
        about="Goodput (mean-TPOT definition) over the grid; the best baseline is the one with the highest "
        "mean over the seeds at that point. `ratio` divides the means, `ratio worst seed` is the least of "
        "the seeds' own ratios; `ratio window` (without the first tenth of the arrivals) and `ratio strict` "
        "are against the baseline that is best by that measure. max_num_seqs "
        f"{args.max_num_seqs}, watermark {points[0].setting.watermark:g}, where a policy names no others.",
        command=command_line("ellm.loadtest.sim.sweep"),
        rows=rows,
        raw=[
            {"setting": asdict(setting), "policy": policy, "seed": seed, **by_task[setting, policy, seed]}
            for setting, policy, seed in tasks
        ],
    )
    for row in rows:
        print("  ".join(f"{key} {_short(value)}" for key, value in row.items()))
    print(f"wrote {result.write(Path(args.out)) if args.out else result.write()}")
    if args.plot:
        plot_curves(result.raw, args.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["llama2-13b"])
    add("--gpus", nargs="+", default=["a100-80g"])
    add("--loads", nargs="+", type=float, default=[0.5, 0.85, 1.0, 1.5])
    add("--slo-ratios", nargs="+", type=float, default=[1.1, 1.3, 1.7, 2.5, 4.0])
    add("--cvs", nargs="+", type=float, default=[1.7])
    add("--workload", default="sharegpt")
    add("--policy", default="adaptive", help="ours")
    add("--baselines", nargs="+", default=BASELINES)
    add("--seeds", nargs="+", type=int, default=[1, 2, 3])
    add("--num-requests", type=int, default=600, help="at least (default: 600)")
    add("--max-num-seqs", type=int, default=256)
    add("--host-gb", type=float, default=0.0)
    add("--kv-bytes", type=float, help="of the KV pool (default: what the weights leave)")
    add("--jobs", type=int, default=1)
    add("--name", default="sim-sweep", help="of the result file")
    add("--out", help="folder of the result file (default: loadtest/results)")
    add("--plot", metavar="FILE", help="goodput over SLOs, all policies; needs matplotlib")
    add("--resume", metavar="FILE", help="keep finished runs here, and do not repeat them")
    return parser


def grid(args: argparse.Namespace) -> Iterator[Point]:
    """Every combination, with an SLO and a number of requests that suit it."""
    for model, gpu in product(args.models, args.gpus):
        base = Setting(
            model=model,
            gpu=gpu,
            workload=args.workload,
            num_requests=args.num_requests,
            load=1.0,
            host_gb=args.host_gb,
            kv_bytes=args.kv_bytes,
            max_num_seqs=args.max_num_seqs,
        )
        base.check()
        base = replace(base, num_requests=max(args.num_requests, TURNS * num_places(base)))
        for load, ratio, cv in product(args.loads, args.slo_ratios, args.cvs):
            slo_ms = 1000 * ratio * base.device.full_step_s
            yield Point(replace(base, load=load, tpot_slo_ms=slo_ms, cv=cv), ratio)


def num_places(setting: Setting) -> int:
    """Requests that fit at once: by memory at their mean context, or by `max_num_seqs`."""
    device = setting.device
    requests, _ = make_requests(setting.workload, 2_000, 0, device.capacity_tokens)
    context = context_read(requests) / sum(r.output_tokens for r in requests)
    return min(setting.max_num_seqs, ceil(device.capacity_tokens / context))


def run_all(tasks: list[Task], kept: Path | None, jobs: int) -> list[Figures]:
    """Figures of every task, in order; those in `kept` are taken from there, the others written to it."""
    known = dict(_read(kept)) if kept is not None and kept.exists() else {}
    left = [task for task in tasks if _key(task) not in known]
    begun = monotonic()
    for count, (i, figures) in enumerate(run_tasks(left, jobs=jobs), 1):
        known[_key(left[i])] = figures
        if kept is not None:
            with kept.open("a") as file:
                file.write(json.dumps({"key": _key(left[i]), "figures": figures}) + "\n")
        _progress(
            len(tasks) - len(left) + count, len(tasks), (monotonic() - begun) / count * (len(left) - count)
        )
    return [known[_key(task)] for task in tasks]


def compare(point: Point, policy: str, runs: dict[str, list[Figures]]) -> Row:
    """One row: ours beside the best baseline, by mean goodput."""
    baselines = [name for name in runs if name != policy]
    mean = {name: means(many) for name, many in runs.items()}
    best = max(baselines, key=lambda name: mean[name]["goodput_tok_s"])
    ours, theirs = mean[policy], mean[best]
    return {
        **point.columns,
        "requests": point.setting.num_requests,
        "goodput": ours["goodput_tok_s"],
        "of bound": ours["goodput_of_bound"],
        "SLO": ours["slo_attainment"],
        "best": theirs["goodput_tok_s"],
        "best SLO": theirs["slo_attainment"],
        "TTFT, s": ours["ttft_mean_s"],
        "best TTFT, s": theirs["ttft_mean_s"],
        "ratio": _ratio(ours["goodput_tok_s"], theirs["goodput_tok_s"]),
        "ratio worst seed": min(
            _ratio(one["goodput_tok_s"], other["goodput_tok_s"])
            for one, other in zip(runs[policy], runs[best], strict=True)
        ),
        "ratio window": _ratio(
            ours["window"]["goodput_tok_s"], max(mean[n]["window"]["goodput_tok_s"] for n in baselines)
        ),
        "ratio strict": _ratio(
            ours["goodput_strict_tok_s"], max(mean[name]["goodput_strict_tok_s"] for name in baselines)
        ),
        "ratio raw": _ratio(ours["throughput_tok_s"], theirs["throughput_tok_s"]),
        "against": best,
    }


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs > 0.0 else (1.0 if ours == 0.0 else float("inf"))


def _key(task: Task) -> str:
    setting, policy, seed = task
    return json.dumps([asdict(setting), policy, seed], sort_keys=True)


def _read(path: Path) -> Iterator[tuple[str, Figures]]:
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # cut off in the middle of a line
            continue
        yield row["key"], row["figures"]


def _progress(done: int, total: int, left_s: float) -> None:
    full = 30 * done // total
    end = "\n" if done == total else ""
    line = f"[{'#' * full}{'.' * (30 - full)}] {done}/{total} runs, {left_s / 60:.1f} min left"
    if sys.stderr.isatty():
        print(f"\r\033[K{line}{end}", end="", file=sys.stderr, flush=True)
    elif done == total or done % max(1, total // 20) == 0:
        print(line, file=sys.stderr, flush=True)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
