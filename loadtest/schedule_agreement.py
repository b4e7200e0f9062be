"""Whether `full-chunked` schedules as vLLM does: both brains on the same requests, step by step, no model.

    python -m ellm.loadtest.schedule_agreement --vllm-python .cache/vllm/bin/python [--requests 150]

Every step takes as long as every other, so that all that can differ is the rules: which step gives which
request a token, and who is preempted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ellm.loadtest.bench_checkpoint import make_checkpoint, with_tokenizer
from ellm.loadtest.generator_limits import portable
from ellm.loadtest.result import Result, Row, command_line
from ellm.loadtest.side import SIDES
from ellm.loadtest.sim.device import EOS, VOCAB_SIZE
from ellm.loadtest.sim.executor import TimedExecutor
from ellm.loadtest.sim.replica import Replica
from ellm.loadtest.sim.workload import SimRequest
from ellm.loadtest.starved_workload import Spec, make_workload
from ellm.loadtest.text_table import text_table
from ellm.worker.api.config import CacheConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.cost_model import CostModel
from ellm.worker.engine.core import EngineCore
from ellm.worker.engine.plan import ModelLimits
from ellm.worker.executor.simulated_link import LinkSpeed

STEP_S = 1.0
ABOUT = """\
`full-chunked` and vLLM's own scheduler, each given the same {requests} requests at the same steps, without a
model: a pool of {blocks} blocks of {block} tokens, at most {seqs} sequences and {rows} tokens a step, no
prefix caching, no watermark. A step is a unit of time. `same tokens` is the share of tokens that come with
the same step in both, `step apart` the largest distance."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps after which each request's tokens come, and all preemptions."""

    times: list[list[int]]
    preempted: int


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", type=Path, default=Path(".cache/vllm/bin/python"))
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--prompt", type=int, default=64, help="mean prompt tokens")
    parser.add_argument("--output", type=int, default=256, help="mean output tokens")
    parser.add_argument("--cap", type=int, default=768, help="most output tokens")
    parser.add_argument("--gap", type=float, default=8.0, help="mean steps between arrivals")
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--max-num-seqs", type=int, default=48)
    parser.add_argument("--max-step-tokens", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--trace", type=Path, help="whose arrivals are taken; without: gamma gaps, cv 1.7")
    parser.add_argument("--checkpoint", type=Path, default=Path(".cache/bench-28m"), help="made if missing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="schedule-agreement", help="slug of the result file")
    return parser.parse_args()


def setting_of(arguments: argparse.Namespace, blocks: int, rows: int) -> dict[str, Any]:
    """What both schedulers are given."""
    spec = Spec(
        arguments.requests, arguments.prompt, arguments.output, arguments.cap, arguments.trace, arguments.seed
    )
    work = make_workload(spec)
    return {
        "arrivals": [int(arguments.gap * at) for at in work.arrivals],
        "prompts": [len(prompt) for prompt in work.prompts],
        "outputs": work.wanted,
        "num_blocks": blocks,
        "block_size": arguments.block_size,
        "max_num_seqs": arguments.max_num_seqs,
        "max_step_tokens": rows,
        "max_model_len": arguments.cap + 4 * arguments.prompt,
    }


def ours(setting: dict[str, Any]) -> Schedule:
    """`full-chunked`, one plan at a time as vLLM on a CPU."""
    limits = ModelLimits(
        num_blocks=setting["num_blocks"],
        block_size=setting["block_size"],
        max_model_len=setting["max_model_len"],
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(EOS,),
    )
    scheduler = SchedulerConfig(
        policy="full-chunked",
        max_num_seqs=setting["max_num_seqs"],
        max_step_tokens=setting["max_step_tokens"],
        watermark=0.0,
        pipeline_depth=1,
    )
    config = WorkerConfig(cache=CacheConfig(prefix_caching=False), scheduler=scheduler)
    ends = setting["outputs"]
    room = setting["max_model_len"]
    requests = [
        SimRequest(STEP_S * at, prompt, output, room - prompt)
        for at, prompt, output in zip(setting["arrivals"], setting["prompts"], ends, strict=True)
    ]
    cost = CostModel.known(overhead_s=STEP_S)
    executor = TimedExecutor(limits, cost, lambda new: ends[new.sampling.seed], LinkSpeed(1e9, 1e9))
    core = EngineCore(limits, config, cost_model=CostModel.known(overhead_s=STEP_S))
    trajectory = Replica(core, executor, requests).run()
    times = [[round(at / STEP_S) for at in steps] for steps in trajectory.token_times]
    return Schedule(times, trajectory.report.num_preemptions)


def theirs(settings: list[dict[str, Any]], python: Path, checkpoint: Path) -> list[Schedule]:
    """vLLM's, in its own environment. Raises RuntimeError with its last lines."""
    command = [str(python), str(SIDES / "vllm_schedule.py"), str(checkpoint.resolve())]
    done = subprocess.run(command, input=json.dumps(settings), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.splitlines()[-15:]))
    return [Schedule(answer["times"], answer["preempted"]) for answer in json.loads(done.stdout)]


def compared(a: Schedule, b: Schedule) -> Row:
    """Token by token."""
    pairs = [(x, y) for s, t in zip(a.times, b.times, strict=True) for x, y in zip(s, t, strict=True)]
    return {
        "preempted, full-chunked": a.preempted,
        "preempted, vLLM": b.preempted,
        "same tokens": sum(x == y for x, y in pairs) / len(pairs),
        "step apart": max(abs(x - y) for x, y in pairs),
        "steps, full-chunked": max(max(steps) for steps in a.times),
        "steps, vLLM": max(max(steps) for steps in b.times),
    }


def main() -> int:
    arguments = parse()
    with_tokenizer(make_checkpoint(arguments.checkpoint, 0))
    shapes = [(blocks, most) for blocks in arguments.blocks for most in arguments.max_step_tokens]
    settings = [setting_of(arguments, *shape) for shape in shapes]
    peers = theirs(settings, arguments.vllm_python, arguments.checkpoint)
    rows: list[Row] = [
        {"blocks": blocks, "tokens a step": most, **compared(ours(setting), peer)}
        for (blocks, most), setting, peer in zip(shapes, settings, peers, strict=True)
    ]
    print(text_table(rows))
    result = Result(
        name=arguments.name,
        title="Full-chunked beside vLLM's own scheduler",
        about=ABOUT.format(
            requests=arguments.requests,
            blocks=", ".join(map(str, arguments.blocks)),
            block=arguments.block_size,
            seqs=arguments.max_num_seqs,
            rows=", ".join(map(str, arguments.max_step_tokens)),
        ),
        command=portable(command_line("ellm.loadtest.schedule_agreement")),
        rows=rows,
        seed=arguments.seed,
    )
    print(f"wrote {result.write()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
