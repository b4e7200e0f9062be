"""Throughput over the share of every context that each step recomputes, with much memory and with little.

    python -m ellm.loadtest.sim.ratio_sweep --jobs 2

With the memory that the weights leave, the overload setting; with starved budgets, short chats (50 tokens in,
100 out in the mean) that come all at once, of which few fit. Beside each the arithmetic: N tokens
of KV against T0 / C_rec (a step with the memory full over the seconds to recompute a token), and the share
that the true cost model finds best (`planner.literal`).
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ellm.loadtest.result import Result, Row, command_line
from ellm.loadtest.sim.device import Device
from ellm.loadtest.sim.headline import OVERLOAD
from ellm.loadtest.sim.metrics import context_read
from ellm.loadtest.sim.run import Task, run_tasks
from ellm.loadtest.sim.setting import Setting, offer
from ellm.worker.api.cost_model import StepFeatures
from ellm.worker.engine.planner.literal import GRID, best_ratio, may_pay, output_rate

RATIOS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
BUDGETS = (256, 512, 1_024, 2_048, 4_096)  # tokens of KV
NUM_REQUESTS = 100  # in the roomy setting, where recompute takes long
NUM_CHATS = 400
MAX_STEP_TOKENS = 32_768  # so that a step has rows for every hole, in the roomy setting
STARVED_STEP_TOKENS = 512
CHAT_MEANS = (50, 100)
CHAT_CAPS = (100, 150)  # the longest fits into the least budget
SEED = 1
ADAPTIVE = "adaptive"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "short-chats.csv"
        write_chats(trace)
        settings = [
            replace(OVERLOAD, num_requests=NUM_REQUESTS, max_step_tokens=MAX_STEP_TOKENS),
            *(starved(trace, tokens) for tokens in BUDGETS),
        ]
        tasks = [(setting, policy, SEED) for setting in settings for policy in policies()]
        tasks += [(with_holes(setting), ADAPTIVE, SEED) for setting in settings]
        figures = {tasks[i]: one for i, one in run_tasks(tasks, jobs=args.jobs)}
        rows = [row(setting, figures) for setting in settings]
    result = Result(
        name="sim-ratio",
        title="Recompute in every step: throughput over the uncached share, simulated",
        about="13B on an A100-80G; tokens per second of literal(r) for each r, and of adaptive and "
        f"full-chunked. First {NUM_REQUESTS} requests of ShareGPT lengths with all memory beside the "
        f"weights, then {NUM_CHATS} short chats (50 in, 100 out) with starved budgets. `T0/C_rec` is the "
        "number of tokens below which recompute pays by the linear arithmetic, and `may pay` its verdict; "
        "`best r, by cost` what a step's true cost, with the rows it has to spare, makes best for the mean "
        "context. Holes are whole blocks of 16 tokens and their transient blocks come out of the budget. "
        "`ratio` is adaptive over full-chunked; with transient blocks (as many as a step's rows fill) it may "
        "recompute a share of its own choice.",
        command=command_line("ellm.loadtest.sim.ratio_sweep"),
        rows=rows,
        seed=SEED,
        raw=[
            {"setting": {**asdict(setting), "workload": workload(setting)}, "policy": policy, "seed": seed}
            | figures[setting, policy, seed]
            for setting, policy, seed in tasks
        ],
    )
    print(f"wrote {result.write()}")
    return 0


def policies() -> list[str]:
    return [*(literal(r) for r in RATIOS), ADAPTIVE, "full-chunked"]


def with_holes(setting: Setting) -> Setting:
    """Transient blocks for the rows of a step, out of the same budget: `adaptive` may then make holes."""
    return replace(setting, transient_blocks=setting.step_blocks)


def literal(r: float) -> str:
    return f"literal({r:g})"


def starved(trace: Path, num_tokens: int) -> Setting:
    device = OVERLOAD.device
    return replace(
        OVERLOAD,
        workload=str(trace),
        rate=None,
        num_requests=NUM_CHATS,
        kv_bytes=float(num_tokens * device.model.kv_token_bytes),
        max_step_tokens=STARVED_STEP_TOKENS,
    )


def write_chats(path: Path) -> None:
    """A trace of short chats that come all at once, with the columns of BurstGPT."""
    rng = np.random.default_rng(SEED)
    lengths = [
        np.clip(np.rint(rng.lognormal(np.log(mean) - 0.18, 0.6, NUM_CHATS)), 4, cap).astype(int)
        for mean, cap in zip(CHAT_MEANS, CHAT_CAPS, strict=True)
    ]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Timestamp", "Request tokens", "Response tokens"])
        writer.writerows((0, prompt, output) for prompt, output in zip(*lengths, strict=True))


def row(setting: Setting, figures: dict[Task, dict[str, Any]]) -> Row:
    device = setting.device
    rate = {policy: figures[setting, policy, SEED]["throughput_tok_s"] for policy in policies()}
    tokens = device.capacity_tokens
    full_step_s, recompute_s = device.full_step_s, device.row_s
    holes = figures[with_holes(setting), ADAPTIVE, SEED]["throughput_tok_s"]
    held = max((r for r in RATIOS if r > 0.0), key=lambda r: rate[literal(r)])
    requests = offer(setting, SEED).requests
    mean = context_read(requests) / sum(request.output_tokens for request in requests)
    return {
        "lengths": workload(setting),
        "N, tokens": tokens,
        "T0/C_rec": full_step_s / recompute_s,
        "may pay": "yes" if may_pay(tokens, full_step_s, recompute_s) else "no",
        "best r, by cost": best_by_cost(device, mean),
        **{f"r = {r:g}": rate[literal(r)] for r in RATIOS},
        ADAPTIVE: rate[ADAPTIVE],
        "adaptive with transient blocks": holes,
        "full-chunked": rate["full-chunked"],
        "best r > 0": held,
        "its attainment": figures[setting, literal(held), SEED]["slo_attainment"],
        "it over r = 0": rate[literal(held)] / rate[literal(0.0)],
        "ratio": rate[ADAPTIVE] / rate["full-chunked"],
        "ratio with transient blocks": holes / rate["full-chunked"],
        "against": "full-chunked",
    }


def best_by_cost(device: Device, mean_tokens: float) -> float:
    """The share that gives most tokens per second by the true cost of a step, with any number of requests of
    `mean_tokens` wanting to run; transient blocks are not counted."""
    cost = device.cost()

    def step_time(decode: float, recompute: float, context: float) -> float:
        pairs = recompute * recompute / max(1.0, decode) / 2
        features = StepFeatures(
            round(decode + recompute), round(decode), round(context), round(pairs), round(decode)
        )
        return cost.predict(features)

    rate = partial(
        output_rate,
        num_tokens=device.capacity_tokens,
        mean_tokens=mean_tokens,
        num_wanted=NUM_CHATS,
        step_time=step_time,
        limit_s=None,
    )
    return best_ratio(rate, GRID)


def workload(setting: Setting) -> str:
    return "sharegpt" if setting.workload == OVERLOAD.workload else "short chats"


if __name__ == "__main__":
    raise SystemExit(main())
