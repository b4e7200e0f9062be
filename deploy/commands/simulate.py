"""`ellm simulate`: the engine's own scheduler and policies on a modelled GPU, faster than time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DEFAULT_POLICIES = "adaptive,full-chunked,full-recompute"

EPILOG = """\
examples:
  ellm simulate --rate 50 --num-requests 600 --tpot-slo-ms 50 --policy adaptive,full-recompute
  ellm simulate --load 0.9 --tpot-slo-ms 100 --host-gb 64 --policy 'full-chunked(max_num_seqs=40)'
  ellm simulate --workload trace.csv --model llama3-8b --gpu h100 --seed 0,1,2 --json out.json --plot out.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--model", default="llama2-13b", help="a preset, or a folder with config.json (default: %(default)s)")
    add("--gpu", default="a100-80g", help="a preset (default: %(default)s)")
    add("--tp", type=int, default=1, metavar="N", help="GPUs that serve the model together (default: 1)")
    add(
        "--workload",
        default="sharegpt",
        metavar="W",
        help="sharegpt, leval, or a trace file with the columns of Azure, BurstGPT or Mooncake",
    )
    add("--num-requests", type=int, default=600, metavar="N", help="default: %(default)s")
    add("--rate", type=float, metavar="R", help="requests per second; a trace without it keeps its own times")
    add(
        "--load",
        type=float,
        metavar="L",
        help="instead of --rate: share of what memory can serve",
    )
    add("--cv", type=float, default=1.7, metavar="C", help="variation of the gaps, 1: Poisson (default: 1.7)")
    add("--policy", default=DEFAULT_POLICIES, metavar="P[,P...]", help="NAME or NAME(max_num_seqs=40,...)")
    add("--tpot-slo-ms", type=float, default=50.0, metavar="X", help="per output token (default: 50)")
    add("--ttft-slo-ms", type=float, metavar="X", help="to the first token (default: none)")
    add("--kv-bytes", type=float, metavar="B", help="of the KV pool (default: what the weights leave)")
    add("--host-gb", type=float, default=0.0, metavar="G", help="of the host tier (default: none)")
    add("--transient-blocks", type=int, metavar="N", help="for holes (default: where a policy needs them)")
    add("--block-size", type=int, default=16, metavar="N", help="tokens (default: 16)")
    add("--max-num-seqs", type=int, default=256, metavar="N", help="default: 256")
    add("--max-step-tokens", type=int, default=2048, metavar="N", help="default: 2048")
    add("--watermark", type=float, default=0.01, metavar="X", help="kept free at admission (default: 0.01)")
    add(
        "--prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="default: where requests of a trace share prefixes",
    )
    add("--seed", default="1", metavar="S[,S...]", help="several: figures are means (default: 1)")
    add("--jobs", type=int, default=1, metavar="N", help="processes that simulate side by side (default: 1)")
    add("--json", metavar="OUT", help="write everything to this file")
    add("--plot", metavar="FILE", help="draw throughput, goodput, attainment and latencies")


def run(args: argparse.Namespace) -> int:
    from ellm.deploy.progress import Progress
    from ellm.loadtest.sim.plots import check_plot, plot
    from ellm.loadtest.sim.run import prepare, simulate_all
    from ellm.loadtest.sim.table import headline, table

    policies, seeds = _policies(args.policy), _seeds(args.seed)
    setting = _setting(args)
    study = prepare(setting, policies, seeds)
    for path in (args.json, args.plot):
        check_folder(path)
    if args.plot:
        check_plot(args.plot)
    progress = Progress()
    what = f"{len(policies)} policies, {len(seeds)} seeds" if len(seeds) > 1 else f"{len(policies)} policies"
    with progress.phase(f"Simulating {what}") as phase:
        result = simulate_all(
            study,
            jobs=max(1, args.jobs),
            on_progress=lambda share: phase.note(bar(share)),
        )
        phase.note("")
    for line in (*headline(result), "", *table(result["policies"])):
        print(line)
    for name, figures in result["policies"].items():
        if "solver_mean_ms" in figures:
            mean, worst = figures["solver_mean_ms"], figures["solver_worst_ms"]
            print(f"{name}: the solver took {mean:.2f} ms per step on this machine, {worst:.1f} at worst")
    if args.json:
        write_json(args.json, result)
    if args.plot:
        plot(result, args.plot)
    return 0


def bar(share: float) -> str:
    """A progress bar of 30 characters."""
    full = int(30 * min(1.0, max(0.0, share)))
    return f"[{'#' * full}{'.' * (30 - full)}] {100 * share:3.0f} %"


def _setting(args: argparse.Namespace) -> Any:
    from dataclasses import fields

    from ellm.loadtest.sim.setting import Setting

    names = {field.name for field in fields(Setting)} & set(vars(args))
    return Setting(**{name: getattr(args, name) for name in names})


def _policies(text: str) -> list[str]:
    from ellm.worker.engine.policies import split_specs

    return list(dict.fromkeys(split_specs(text)))


def _seeds(text: str) -> list[int]:
    from ellm.worker.api.errors import ConfigError

    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        seeds = [-1]
    if min(seeds) < 0:
        raise ConfigError(f"--seed takes whole numbers from 0 on, with commas between them, not {text!r}")
    return list(dict.fromkeys(seeds))


def check_folder(path: str | None) -> None:
    """Before minutes of work, not after."""
    from ellm.worker.api.errors import ConfigError

    if path is not None and not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"cannot write {path}: there is no folder {Path(path).parent}")


def write_json(path: str, result: dict[str, Any]) -> None:
    import json

    from ellm.worker.api.errors import ConfigError

    try:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
