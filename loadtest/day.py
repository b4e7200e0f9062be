"""A simulated fleet's day, squeezed into two hours: diurnal load, workers that die, the controller's scaling.

    python -m ellm.loadtest.day --trace azure_conv_2023.csv --jobs 2 --plot docs/day.png

Up to 20 workers, the real engine cores, controller and routing policy, the same requests and the same moments
of death for each variant. It exits with 1 if a request was lost in any of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ellm.loadtest.result import Result, Row
from ellm.loadtest.routing_quality import source_hash
from ellm.loadtest.sim.fleet import Fleet
from ellm.loadtest.sim.fleet_metrics import fleet_figures
from ellm.loadtest.sim.fleet_plot import plot_day
from ellm.loadtest.sim.fleet_setting import Deaths, FleetSetting
from ellm.loadtest.sim.plots import check_plot
from ellm.worker.api.errors import ConfigError

Figures = dict[str, Any]
Task = tuple[str, FleetSetting, int]  # variant, setting, seed

OURS = "autoscaled, adaptive"
RIVALS = {f"autoscaled, {policy}": policy for policy in ("full-recompute", "full-chunked")}
COMPARED = {"goodput_tok_s": "goodput", "good_tokens_per_gpu_hour": "good tokens per GPU hour"}


def variants(setting: FleetSetting) -> dict[str, FleetSetting]:
    most = setting.max_workers
    return {
        OURS: setting,
        f"fixed {most}, adaptive": replace(setting, min_workers=most),
        **{name: replace(setting, scheduling=policy) for name, policy in RIVALS.items()},
    }


def simulate(task: Task) -> Figures:
    name, setting, seed = task
    requests, left_out = setting.requests(seed)
    gc.disable()  # a run makes millions of objects and hardly a cycle
    try:
        run = Fleet(setting, requests, seed).run()
    except Exception as error:
        error.add_note(f"simulating {name}, seed {seed}, {setting}")
        raise
    finally:
        gc.enable()
    return {**fleet_figures(setting, requests, run), "left_out_rows": left_out}


def run_all(tasks: Sequence[Task], resume: Path | None, jobs: int) -> dict[str, Figures]:
    """Figures by variant; what the same code has finished is kept in `resume`, and not run again."""
    known: dict[str, Figures] = {}
    if resume is not None and resume.exists():
        known = dict(json.loads(line) for line in resume.read_text().splitlines())
    code = source_hash()
    keys = {name: json.dumps([code, asdict(setting), seed]) for name, setting, seed in tasks}
    missing = [task for task in tasks if keys[task[0]] not in known]
    for name, figures in _finished(missing, jobs):
        known[keys[name]] = figures
        if resume is not None:
            with resume.open("a") as file:
                file.write(json.dumps([keys[name], figures]) + "\n")
        print(f"{name}: {figures['cpu_s']:.0f} s of this machine, {figures['lost']} lost", flush=True)
    return {name: known[keys[name]] for name, _, _ in tasks}


def _finished(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[str, Figures]]:
    """As they end."""
    if jobs == 1:
        yield from ((task[0], simulate(task)) for task in tasks)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(simulate, task): task[0] for task in tasks}
        yield from ((futures[future], future.result()) for future in as_completed(futures))


def row(name: str, one: Figures, rivals: Mapping[str, Figures]) -> Row:
    """Ours stands beside the best of the rivals, for each figure by itself."""
    made: Row = {
        "variant": name,
        "goodput, tok/s": one["goodput_tok_s"],
        "SLO": one["slo_attainment"],
        "TTFT mean, s": one["ttft_mean_s"],
        "TTFT p99, s": one["ttft_p99_s"],
        "p99 TPOT, ms": 1000 * one["tpot_p99_s"],
        "GPU hours": one["gpu_hours"],
        "good tokens per GPU hour": one["good_tokens_per_gpu_hour"],
        "requests": one["requests"],
        "lost": one["lost"],
        "deaths": one["crashes"] + one["silent_deaths"],
        "scalings": f"{one['scalings_up']} up, {one['scalings_down']} down",
        "moved by deaths": one["moved_by_death"],
        "moved by drains": one["moved_by_drain"],
    }
    if name == OURS and rivals:
        for key, what in COMPARED.items():
            best = max(rival[key] for rival in rivals.values())
            made[f"ratio {what}"] = round(one[key] / best, 3)
        made["against"] = "the best of " + ", ".join(rivals)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    setting = _setting(args)
    try:
        setting.check()
        if args.plot:
            check_plot(args.plot)
        chosen = {name: s for name, s in variants(setting).items() if not args.only or args.only in name}
        tasks = [(name, one, args.seed) for name, one in chosen.items()]
        runs = run_all(tasks, Path(args.resume) if args.resume else None, args.jobs)
    except ConfigError as error:
        print(error)
        return 2
    rivals = {name: one for name, one in runs.items() if name in RIVALS}
    rows = [row(name, one, rivals) for name, one in runs.items()]
    for one in rows:
        print(json.dumps(one))
    if args.plot:
        plot_day(runs, args.plot)
    if not args.dry:
        print(f"wrote {_result(args, setting, runs, rows).write()}")
    return 1 if any(one["lost"] for one in runs.values()) else 0


def _setting(args: argparse.Namespace) -> FleetSetting:
    return FleetSetting(
        trace=args.trace,
        min_workers=args.workers[0],
        max_workers=args.workers[1],
        duration_s=args.duration_s,
        peak_rate=args.peak_rate,
        deaths=Deaths(args.deaths),
    )


def _result(
    args: argparse.Namespace, setting: FleetSetting, runs: Mapping[str, Figures], rows: list[Row]
) -> Result:
    speed = min(one["simulated_s_per_cpu_s"] for one in runs.values())
    moved = {name: f"{one['tokens']:,} tokens of {one['tokens_asked']:,}" for name, one in runs.items()}
    return Result(
        name="day",
        title="A fleet's day, simulated",
        about=_about(setting),
        command=_command(args, setting),
        rows=rows,
        seed=args.seed,
        notes=[
            "Lost is counted, not assumed: the index of each token must be the number of those before it, "
            "and a request that did not end exactly once with exactly its tokens is lost. "
            + "; ".join(f"{name}: {what}" for name, what in moved.items())
            + ".",
            "The day is squeezed twelvefold, so load rises twelve times as steeply as in life while a start "
            "takes as long as it does: a fleet that scales is tried harder here. Deaths are far more "
            "frequent than in life.",
            "The curve of the day, the phases of a start and how long it takes until a death is noticed are "
            "assumptions (loadtest/sim/diurnal.py, fleet_setting.py); lengths and the variation of gaps are "
            "those of the Azure conversation trace. Prefixes are not shared. Workers report every "
            f"{1000 * setting.report_s:g} ms, not every 100, to save time.",
            f"{speed:.0f} simulated seconds per second of one core at least.",
        ],
        raw={"setting": {**asdict(setting), "trace": Path(setting.trace).name}, "runs": runs},
    )


def _about(setting: FleetSetting) -> str:
    phases = setting.start_up.phases(setting.device.model.weight_bytes)
    start = " + ".join(f"{seconds:.0f} s {name}" for name, seconds in phases.items())
    return (
        f"{setting.min_workers} to {setting.max_workers} workers, Qwen3 32B on one A100-80G each (6.5 GB of "
        f"KV), {setting.num_routers} routers, {setting.duration_s / 3600:g} h that hold a day from midnight "
        f"to midnight: {setting.peak_rate:g} requests per second at the peak, a fifth of that at night, gaps "
        f"gamma with cv {setting.cv:g}; lengths of the Azure conversation trace; SLOs "
        f"{1000 * setting.tpot_slo_s:g} ms per token and {setting.ttft_slo_s:g} s to the first. Engines, "
        "routing policy, scaling, weights and drains are those that serve. A start takes "
        f"{start}, within {100 * setting.start_up.jitter:g} %. {setting.deaths.count} workers die: every "
        "other one a process, which routers notice at once, the rest nodes that fall silent, which routers "
        f"give up after {setting.failover.fail_s:g} s and Ray after {setting.deaths.silent_noticed_s:g} s. A "
        "request moves with the tokens that it has. GPU hours count starts, drains, and the dead until they "
        "are noticed."
    )


def _command(args: argparse.Namespace, setting: FleetSetting) -> str:
    plain = FleetSetting(trace="")
    words = ["python -m ellm.loadtest.day --trace TRACE"]
    if (setting.min_workers, setting.max_workers) != (plain.min_workers, plain.max_workers):
        words.append(f"--workers {setting.min_workers} {setting.max_workers}")
    for name in ("duration_s", "peak_rate"):
        if getattr(setting, name) != getattr(plain, name):
            words.append(f"--{name.replace('_', '-')} {getattr(setting, name):g}")
    if setting.deaths.count != plain.deaths.count:
        words.append(f"--deaths {setting.deaths.count}")
    return " ".join([*words, f"--seed {args.seed}", "--plot docs/day.png"])


def _parser() -> argparse.ArgumentParser:
    plain = FleetSetting(trace="")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trace", required=True, metavar="FILE", help="lengths: the Azure conversation trace")
    add("--duration-s", type=float, default=plain.duration_s, help="that the day is squeezed into")
    add("--peak-rate", type=float, default=plain.peak_rate, help="requests per second at the peak")
    least_most = (plain.min_workers, plain.max_workers)
    add("--workers", nargs=2, type=int, default=least_most, metavar=("LEAST", "MOST"))
    add("--deaths", type=int, default=plain.deaths.count, help="workers that die in all")
    add("--seed", type=int, default=1)
    add("--jobs", type=int, default=1, help="processes side by side")
    add("--only", metavar="WORD", help="variants whose name has this in it")
    add("--resume", metavar="FILE", help="keep finished runs here, and do not repeat them")
    add("--plot", metavar="FILE", help="a picture of the day: png or svg")
    add("--dry", action="store_true", help="print the rows alone")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
