"""What the brain costs: microseconds of EngineCore per scheduled sequence, with a number of them decoding.

begin_step and finish_step are timed at pipeline depth 2 around the simulated executor, whose own time is left
out. The least of several means is the figure: that is the program's own cost, and the rest is the machine's
other work.

    python -m ellm.loadtest.core_cost
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Sequence
from statistics import mean
from time import perf_counter

from ellm.loadtest.result import Result, Row, command_line
from ellm.worker.api.config import SchedulerConfig, WorkerConfig
from ellm.worker.api.cost_model import CostModel
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.engine.core import EngineCore
from ellm.worker.engine.plan import BatchPlan, ModelLimits
from ellm.worker.executor.simulated import SimulatedExecutor

BATCHES = (1, 8, 32, 128, 256)
BUDGET_US = 10.0  # per scheduled sequence, at 32 and more
_PROMPT, _STEPS, _ROUNDS = 256, 128, 5
_BLOCK = 16


def measure_core_cost(num_seqs: int, *, steps: int = _STEPS, rounds: int = _ROUNDS) -> dict[str, float]:
    """Microseconds per scheduled sequence and step: `total_us`, and its parts `begin_us` and `finish_us`.

    `num_seqs` requests of 256 prompt tokens decode; prefix cache on, so that blocks are hashed as they fill.
    """
    total = _PROMPT + steps * (rounds + 2)
    limits = ModelLimits(num_seqs * (total // _BLOCK + 2), _BLOCK, total + 64, 32_000, (0,))
    config = WorkerConfig(scheduler=SchedulerConfig(max_num_seqs=num_seqs))
    core = EngineCore(limits, config)
    executor = SimulatedExecutor(limits, CostModel.known(overhead_s=0.005, kv_token_s=1e-8), verify=False)
    for i in range(num_seqs):
        prompt = tuple((7 * i + 13 * j) % 32_000 for j in range(_PROMPT))
        sampling = SamplingParams(max_tokens=total - _PROMPT, ignore_eos=True, seed=i)
        core.add_request(EngineRequest(f"request-{i}", prompt, sampling), 0.0)
    outstanding: deque[BatchPlan] = deque()
    while core.report(0.0).generation_tokens < 2 * num_seqs:  # every prompt is in
        _turn(core, executor, outstanding)
    rounds_us = []
    for _ in range(rounds):
        times = [_turn(core, executor, outstanding) for _ in range(steps)]
        rounds_us.append(tuple(1e6 * mean(part) / num_seqs for part in zip(*times, strict=True)))
    begin_us, finish_us = min(rounds_us, key=sum)
    return {
        "num_seqs": num_seqs,
        "total_us": begin_us + finish_us,
        "begin_us": begin_us,
        "finish_us": finish_us,
    }


def _turn(
    core: EngineCore, executor: SimulatedExecutor, outstanding: deque[BatchPlan]
) -> tuple[float, float]:
    """Plan as far as the core goes and take one step back; seconds of (begin_step, finish_step)."""
    start = perf_counter()
    while (plan := core.begin_step(0.0)) is not None:
        outstanding.append(plan)
    begun = perf_counter()
    plan = outstanding.popleft()
    result = executor.execute(plan)
    executed = perf_counter()
    outputs = core.finish_step(plan, result, 0.0)
    finished = perf_counter()
    assert len(outputs) == sum(entry.samples for entry in plan.entries)
    return begun - start, finished - executed


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per batch size, write the result file; 1 if one of 32 and more is above the budget."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(arguments)
    figures = [measure_core_cost(num_seqs) for num_seqs in BATCHES]
    rows: list[Row] = [
        {
            "sequences": int(figure["num_seqs"]),
            "begin_step, us each": figure["begin_us"],
            "finish_step, us each": figure["finish_us"],
            "us each": figure["total_us"],
            "ratio": BUDGET_US / figure["total_us"] if figure["num_seqs"] >= 32 else None,
            "against": "budget of 10 us" if figure["num_seqs"] >= 32 else None,
        }
        for figure in figures
    ]
    for row in rows:
        print(f"{row['sequences']:4} sequences: {row['us each']:6.2f} us each")
    result = Result(
        name="core-cost",
        title="The engine's brain",
        about="Microseconds of EngineCore (planning a step and taking its result) per decoding sequence, "
        "pipeline depth 2, prefix cache on, the executor's own time left out; means over whole blocks of "
        "tokens, the least of several.",
        command=command_line("ellm.loadtest.core_cost"),
        rows=rows,
        raw=figures,
    )
    print(f"wrote {result.write()}")
    return int(any(one["total_us"] > BUDGET_US for one in figures if one["num_seqs"] >= 32))


if __name__ == "__main__":
    raise SystemExit(main())
