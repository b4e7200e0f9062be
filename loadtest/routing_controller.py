"""What the controller's advice does to the default routing policy: the same cells with and without it.

    python -m ellm.loadtest.routing_controller --traces FOLDER --seeds 1 2 3

Cells, requests and engines are those of routing_quality.py. With the controller its real brain ticks on the
same reports, and each router follows its weights and budgets (sim/cluster_control.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean

from ellm.loadtest.result import Result, Row
from ellm.loadtest.routing_quality import DELAYS_MS, OURS, settings, simulate
from ellm.loadtest.sim.cluster_metrics import Figures

Pair = tuple[Figures, Figures]  # without, with


def row(trace: str, delay_ms: int, runs: Sequence[Pair]) -> Row:
    """One cell: means over seeds. Ratios above 1: better with the controller."""

    def means(name: str) -> tuple[float, float]:
        return fmean(one[name] for one, _ in runs), fmean(one[name] for _, one in runs)

    goodput, ttft, slo = means("goodput_tok_s"), means("ttft_p99_s"), means("slo_attainment")
    return {
        "trace": trace,
        "reports late by": f"{delay_ms} ms",
        "SLO without": slo[0],
        "SLO": slo[1],
        "goodput without": goodput[0],
        "goodput": goodput[1],
        "p99 TTFT without, s": ttft[0],
        "p99 TTFT, s": ttft[1],
        "choices that fell back": sum(int(one["fallbacks"]) for _, one in runs),
        "ratio goodput": round(goodput[1] / goodput[0], 3),
        "ratio p99 TTFT": round(ttft[0] / ttft[1], 3),
        "against": "no controller",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--traces", required=True, metavar="FOLDER", help="with both trace files")
    add("--requests", type=int, help="per run (default: 300 and 180)")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3])
    add("--dry", action="store_true", help="write no result file")
    args = parser.parse_args(arguments)
    rows, raw = [], []
    for (trace, setting), delay in product(settings(Path(args.traces), args.requests).items(), DELAYS_MS):
        pairs: list[Pair] = []
        for seed in args.seeds:
            alone, advised = (
                simulate((replace(setting, report_delay_s=delay / 1000, controller=on), OURS, seed))
                for on in (False, True)
            )
            pairs.append((alone, advised))
            raw.append({"trace": trace, "delay_ms": delay, "seed": seed, "without": alone, "with": advised})
        rows.append(row(trace, delay, pairs))
        print(rows[-1], flush=True)
    seeds = " ".join(map(str, args.seeds))
    result = Result(
        name="routing-controller",
        title="Routing with the controller's advice and without, simulated",
        about=f"The cells of the routing-quality benchmark, the policy {OURS} alone, means over seeds "
        f"{seeds}. With the controller its real brain ticks every 0.5 s on the same reports, as late as the "
        "routers', and each router asks it once a second and follows its weights and admission budgets. "
        "Ratios: with over without for goodput, without over with for p99 TTFT. What weights would say twice "
        "is left out of the prediction (docs/decisions/0005-routing.md), so little is to be seen here: the "
        "controller is for workers that hang, fall silent or do far worse than they report, and these cells "
        "have none.",
        command=f"python -m ellm.loadtest.routing_controller --traces TRACES --seeds {seeds}"
        + (f" --requests {args.requests}" if args.requests else ""),
        rows=rows,
        seed=args.seeds[0],
        raw=raw,
    )
    if not args.dry:
        print(f"wrote {result.write()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
