"""The setting of the paper on adaptive KV caching, in the simulator: its models, GPUs, lengths, rates, SLOs.

    python -m ellm.loadtest.sim.paper_runs --jobs 2 --resume paper.jsonl

Chen et al., EuroSys 2026, doi 10.1145/3767295.3803570: Llama-2 13B on one A100-80G and 70B on four, without
NVLink; ShareGPT lengths at 50 requests per second and L-Eval's at 12.5; arrivals with the variation of the
Azure conversation trace. docs/paper.md (ellm.loadtest.paper) holds what comes out against what is printed
there. L-Eval's runs are short: a prompt of 36,000 tokens leaves room for one or two requests on 13B, and
those that fit into no pool are cut to what fits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ellm.loadtest.result import Result, Row
from ellm.loadtest.sim.run import Task, means
from ellm.loadtest.sim.setting import Setting
from ellm.loadtest.sim.sweep import Figures, run_all

HOST_GB = 64.0
OURS = "adaptive"
TUNED = "full-recompute(max_num_seqs=40)"
RIVALS = {  # as the paper calls them -> as they are called here
    "vLLM-Recompute": "full-recompute",
    "vLLM-Swap": "full-swap",
    "HCache": "hcache",
}
POLICIES = [OURS, *RIVALS.values()]


@dataclass(frozen=True, slots=True)
class Case:
    """One column of the paper's evaluation."""

    name: str
    setting: Setting
    cached_ratio: float  # mean, as printed


def cases(requests: int | None = None) -> list[Case]:
    """`requests` instead of each case's own number."""

    def case(name: str, model: str, workload: str, slo_ms: float, ratio: float, count: int) -> Case:
        big = model == "llama2-70b"
        setting = Setting(
            model=model,
            gpu="a100-80g-pcie",
            tp=4 if big else 1,
            workload=workload,
            rate=50.0 if workload == "sharegpt" else 12.5,
            tpot_slo_ms=slo_ms,
            num_requests=requests or count,
            host_gb=4 * HOST_GB if big else HOST_GB,
        )
        return Case(name, setting, ratio)

    return [
        case("13B, ShareGPT", "llama2-13b", "sharegpt", 50.0, 0.64, 600),
        case("70B, ShareGPT", "llama2-70b", "sharegpt", 500.0, 0.64, 400),
        case("13B, L-Eval", "llama2-13b", "leval", 60.0, 0.53, 12),
        case("70B, L-Eval", "llama2-70b", "leval", 200.0, 0.53, 24),
    ]


def policies(case: Case) -> list[str]:
    """The tuned baseline beside the others where the setting is one that somebody would tune for."""
    return [*POLICIES, TUNED] if case.name == "13B, ShareGPT" else POLICIES


def literal_step(case: Case) -> dict[str, float]:
    """A step at the paper's mean cached ratio, with the memory full of what is cached: every uncached token
    is recomputed in it. Linear layers alone; attention comes on top."""
    device = case.setting.device
    uncached = device.capacity_tokens * (1.0 - case.cached_ratio) / case.cached_ratio
    recompute_s = uncached * device.row_s
    return {
        "tokens cached": float(device.capacity_tokens),
        "tokens recomputed": uncached,
        "recompute_s": recompute_s,
        "over_slo": 1000.0 * recompute_s / case.setting.tpot_slo_ms,
    }


def rows(chosen: Sequence[Case], done: dict[Task, Figures], seeds: Sequence[int]) -> list[Row]:
    made: list[Row] = []
    for case in chosen:
        mean = {p: means([done[case.setting, p, seed] for seed in seeds]) for p in policies(case)}
        ours = mean[OURS]
        for policy, figures in mean.items():
            row: Row = {
                "case": case.name,
                "policy": policy,
                "tok/s": figures["throughput_tok_s"],
                "goodput": figures["goodput_tok_s"],
                "of bound": figures["goodput_of_bound"],
                "SLO": figures["slo_attainment"],
                "TTFT, s": figures["ttft_mean_s"],
                "p99 TPOT, ms": 1000 * figures["tpot_p99_s"],
                "mean batch": figures["mean_batch"],
                "uncached share": figures["uncached_ratio_mean"],
                "preemptions": figures["preemptions"],
            }
            if policy != OURS:
                row["ours over it, tok/s"] = _over(ours["throughput_tok_s"], figures["throughput_tok_s"])
                row["ours over it, goodput"] = _over(ours["goodput_tok_s"], figures["goodput_tok_s"])
                row["its TTFT over ours"] = _over(figures["ttft_mean_s"], ours["ttft_mean_s"])
            made.append(row)
    return made


def _over(one: float, other: float) -> float | None:
    """None where the other is nothing."""
    return one / other if other > 0.0 else None


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    chosen = cases(args.requests)
    tasks = [
        (case.setting, policy, seed) for seed in args.seeds for case in chosen for policy in policies(case)
    ]
    figures = run_all(tasks, Path(args.resume) if args.resume else None, args.jobs)
    made = rows(chosen, dict(zip(tasks, figures, strict=True)), args.seeds)
    for row in made:
        print(row)
    if not args.dry:
        print(f"wrote {_result(args, chosen, made).write()}")
    return 0


def _result(args: argparse.Namespace, chosen: Sequence[Case], made: list[Row]) -> Result:
    few = f" --requests {args.requests}" if args.requests else ""
    counts = ", ".join(f"{case.name} {case.setting.num_requests}" for case in chosen)
    raw: dict[str, Any] = {case.name: literal_step(case) for case in chosen}
    return Result(
        name="sim-paper",
        title="The paper's evaluation, simulated",
        about="Llama-2 13B on an A100-80G (SLO 50 ms on ShareGPT, 60 on L-Eval) and 70B on four without "
        "NVLink (500 and 200 ms); ShareGPT lengths at 50 requests per second, L-Eval's at 12.5, gaps gamma "
        f"with cv 1.7; requests: {counts}. Host tier 64 GB a GPU for those that use one, max_num_seqs 256, "
        f"watermark 0.01, means over seeds {', '.join(map(str, args.seeds))}. Held against the paper in "
        "docs/paper.md.",
        command=f"python -m ellm.loadtest.sim.paper_runs --seeds {' '.join(map(str, args.seeds))}{few}",
        rows=made,
        seed=args.seeds[0],
        raw=raw,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, default=[1])
    add("--requests", type=int, help="of each case (default: each its own number)")
    add("--jobs", type=int, default=1)
    add("--resume", metavar="FILE", help="keep finished runs here, and do not repeat them")
    add("--dry", action="store_true", help="print the rows alone")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
