"""The scheduling policies beside each other on the real CPU engine, with a KV pool that is too small.

    python -m ellm.loadtest.starved_pool [--requests 120] [--load 1.0] [--slo-ratio 2.0] [--policies ...]

Requests come by the clock (gamma gaps), the same at the same times for every policy, through EngineLoop and
LocalExecutor, with the host tier off and on.

**The engine does not know how long an output will be.** A first run with a roomy pool says what each prompt
continues with; a request's stop token is the token of that continuation which first appears nearest to the
place where it shall end. Every request asks for the same large `max_tokens`, the stop token ends it, and no
policy can see when. So the tokens of every policy must also be those of the roomy run up to that place,
which is checked: a policy that changed a single one ends elsewhere.

The simulator runs beside it (starved_predicted.py): a cost model fitted on a part of one policy's steps says
how long the steps of all others take, and the same arrivals through the same policies in simulated time say
what goodput and TTFT should have been.
"""

from __future__ import annotations

import argparse
import os
import random
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ellm.kernels.packed_linear import is_packable
from ellm.loadtest import step_fit
from ellm.loadtest.bench_checkpoint import SHAPE, make_checkpoint
from ellm.loadtest.open_loop import run_open_loop
from ellm.loadtest.result import Result, Row, command_line
from ellm.loadtest.saturated import FULL, measure_saturated
from ellm.loadtest.sim.metrics import measure
from ellm.loadtest.sim.workload import SimRequest, with_arrivals
from ellm.loadtest.starved_predicted import FITTED, fitted_policy, predict
from ellm.loadtest.starved_rounds import Probe, Taken, has_time, in_turns, probing
from ellm.loadtest.starved_rows import BASELINE, OURS, rows_of
from ellm.loadtest.unforeseen import Offered, check_tokens, lengths, peak_context, stop_index
from ellm.worker.api.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.build import LoadedEngine, load_engine

POLICIES = (FITTED, BASELINE, OURS, "full-swap", "full-offload", "full-predictive")
BLOCK = 16
CALIBRATION = 120  # requests at once, before the runs

# What another device sets otherwise.
CPU: dict[str, Any] = {
    "device": "cpu",
    "deterministic": None,
    "transient_blocks": 0,
    "max_num_seqs": 64,
    "max_step_tokens": 256,
    "vocab": SHAPE["vocab_size"],
    "hosts": ("off", "on"),
    "temperature": 0.0,
    "full": FULL,
    "rounds": 1,
    "pairs": 0,
    "until": None,  # when no further policy begins, by time.monotonic
}

ABOUT = """\
{model} in {dtype}{widened} on {threads} threads; {requests} requests at {rate:.2f}/s (gamma gaps, cv {cv:g}),
mean {prompt:.0f} prompt and {output:.0f} output tokens, ended by a stop token that the engine cannot foresee
under `max_tokens` {cap}. The pool holds {pool:,} tokens; the same arrivals hold {offered:,.0f} of context
at their peak where the pool is roomy. SLO {slo:.3g} ms per token, {ratio:g} times a step with the pool full
as measured before. All policies give the same tokens; means over the runs, every second round backwards.
`machine`: how much slower it was than in the runs of `{fitted}`, by a step between the others that is
always the same, as far as the fitted steps followed that. `sim` columns:
the simulator's figures for the same arrivals by a cost model fitted once, on the first halves of the runs of
`{fitted}`, and scaled by `machine` for each run; what those steps took is added in the mean of the fitted
runs, and the link is as fast as it was in each. The steps of the other halves and of all other policies are
said to take what the model says, times the machine's pace around them, scattered as in those.
`ratio`: goodput by the one of `full-recompute`, `ratio TTFT`: its mean TTFT by this one's, medians of the
ratios within a round."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(".cache/bench-28m"), help="made if missing")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--prompt", type=int, default=64, help="mean prompt tokens")
    parser.add_argument("--output", type=int, default=128, help="mean output tokens")
    parser.add_argument("--cap", type=int, default=384, help="max_tokens of every request")
    parser.add_argument("--pool-blocks", type=int, default=128)
    parser.add_argument("--host-mib", type=int, default=64)
    parser.add_argument("--load", type=float, default=1.0, help="share of what the starved pool can serve")
    parser.add_argument("--cv", type=float, default=1.7)
    parser.add_argument("--slo-ratio", type=float, default=2.0, help="SLO over a step with a full pool")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES, metavar="POLICY")
    parser.add_argument("--rounds", type=int, default=1, help="each policy so often, forth and back in turns")
    parser.add_argument("--pairs", type=int, default=0, help="then so often the two compared, alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="starved-pool", help="slug of the result file")
    parser.set_defaults(**CPU)
    return parser.parse_args()


def config_of(arguments: argparse.Namespace, policy: str, blocks: int, host_mib: int) -> WorkerConfig:
    return WorkerConfig(
        model=ModelConfig(
            path=str(arguments.model),
            device=arguments.device,
            dtype=arguments.dtype,
            deterministic=arguments.deterministic,
        ),
        cache=CacheConfig(
            num_blocks=blocks,
            block_size=BLOCK,
            host_bytes=host_mib << 20,
            host_tier="copied",
            transient_blocks=arguments.transient_blocks,
        ),
        scheduler=SchedulerConfig(
            policy=policy,
            max_num_seqs=arguments.max_num_seqs,
            max_step_tokens=arguments.max_step_tokens,
        ),
        num_threads=arguments.threads,
    )


def load(config: WorkerConfig) -> LoadedEngine:
    return load_engine(config, lambda what, share: None)


def continuations(
    arguments: argparse.Namespace, prompts: list[tuple[int, ...]], wanted: list[int]
) -> list[list[int]]:
    """What each prompt continues with, cut after a token of its own near the wanted length."""
    sampling = SamplingParams(temperature=arguments.temperature, max_tokens=arguments.cap, ignore_eos=True)
    at_once = min(len(prompts), arguments.max_num_seqs)
    room = at_once * -(-(max(map(len, prompts)) + arguments.cap) // BLOCK)
    requests = [
        EngineRequest(
            str(i), prompt, replace(sampling, seed=i, max_tokens=min(arguments.cap, wanted[i] + 64))
        )
        for i, prompt in enumerate(prompts)
    ]
    run = run_open_loop(
        load(config_of(arguments, "full-chunked", room, 0)), requests, [0.0] * len(prompts), 600.0
    )
    return [tokens[: stop_index(tokens, n - 1) + 1] for tokens, n in zip(run.tokens, wanted, strict=True)]


def offer(arguments: argparse.Namespace) -> tuple[Offered, float, float, float]:
    """What comes; the rate, the SLO and a full step, both in seconds."""
    rng = random.Random(arguments.seed)
    count = arguments.requests
    sizes = lengths(rng, arguments.prompt, 4 * arguments.prompt, count)
    prompts = [tuple(rng.randrange(3, arguments.vocab) for _ in range(size)) for size in sizes]
    wanted = lengths(rng, arguments.output, arguments.cap - 64, count)
    expected = continuations(arguments, prompts, wanted)
    engine = load(config_of(arguments, "full-chunked", arguments.pool_blocks, 0))
    offered = Offered([0.0] * count, prompts, expected, arguments.cap, arguments.temperature)
    capacity = measure_saturated(engine, offered, min(count, CALIBRATION), arguments.full)
    rate = arguments.load * capacity.output_tok_s / fmean(map(len, expected))
    arrivals = with_arrivals([SimRequest(0.0, 1, 1, 1)] * count, rate, arguments.cv, arguments.seed)
    first = arrivals[0].arrival_s
    offered = replace(offered, arrivals=[one.arrival_s - first for one in arrivals])
    step_s = capacity.full_step_s
    return offered, rate, arguments.slo_ratio * step_s, step_s


def run_all(
    arguments: argparse.Namespace, offered: Offered, slo_s: float
) -> tuple[list[Row], dict[str, Any]]:
    raw: dict[str, Any] = {"runs": [], "load_average": [], "left_out": []}
    probe = None  # a GPU of one's own is as fast as ever
    if arguments.device == "cpu":
        probe = Probe(load(config_of(arguments, FITTED, Probe.BLOCKS, 0)).executor)
    try:
        taken = _take_all(arguments, offered, slo_s, probe, raw)
    finally:
        if probe is not None:
            probe.close()
    said = predict(offered, taken, slo_s)
    raw |= {"followed": said.followed, "step_errors": said.errors_of_all}
    for entry, sample, errors in zip(raw["runs"], said.samples, said.errors, strict=True):
        entry |= {"slowness": sample.slowness, "simulated": asdict(sample.sim), "step_errors": errors}
    return rows_of(said.samples), raw


def _take_all(
    arguments: argparse.Namespace, offered: Offered, slo_s: float, probe: Probe | None, raw: dict[str, Any]
) -> list[Taken]:
    """All runs in turns; what is to be kept of each goes to `raw`."""
    taken: list[Taken] = []
    pairs = arguments.pairs, [policy for policy in (BASELINE, OURS) if policy in arguments.policies]
    for number, host, policy in in_turns(arguments.rounds, arguments.hosts, arguments.policies, *pairs):
        if not has_time(arguments.until, [one.real.duration_s for one in taken]):
            if policy not in [*raw["left_out"], *(one.policy for one in taken)]:
                raw["left_out"].append(policy)
            continue
        mib = arguments.host_mib if host == "on" else 0
        config = config_of(arguments, policy, arguments.pool_blocks, mib)
        engine = load(config)
        raw["load_average"].append(os.getloadavg()[0])
        run = run_open_loop(engine, offered.requests(slo_s), offered.arrivals, probe=probe)
        check_tokens(run, offered, policy)
        real = measure(offered.arrivals, run.token_times, slo_s)
        taken.append(Taken(policy, host, number, config, engine.executor.limits, run, real))
        raw["runs"].append(
            {
                "round": number,
                "policy": policy,
                "host_mib": mib,
                "measured": asdict(real),
                "steps": len(run.steps),
                "probing": probing(run),
                "cost_model_error": engine.core.cost_model.error_median,
                "report": {k: v for k, v in asdict(run.report).items() if isinstance(v, int | float)},
            }
        )
        print(
            f"{number} {policy:16} host {host:3} {real.goodput_tok_s:7.0f} goodput, attains "
            f"{real.slo_attainment:.3f}, TTFT {real.ttft_mean_s:6.3f} s, {real.duration_s:.1f} s",
            flush=True,
        )
    return taken


def main() -> int:
    arguments = parse()
    # One core more than those that compute: for copies, which have engines of their own on a GPU.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads + 1])
    if arguments.model == Path(".cache/bench-28m"):
        make_checkpoint(arguments.model, 0)
    offered, rate, slo_s, step_s = offer(arguments)
    print(f"{rate:.2f} requests/s, SLO {1e3 * slo_s:.1f} ms, a full step {1e3 * step_s:.1f} ms", flush=True)
    roomy_config = config_of(arguments, "full-chunked", 64 * 40, 0)
    roomy = run_open_loop(load(roomy_config), offered.requests(slo_s), offered.arrivals)
    check_tokens(roomy, offered, "roomy")
    peak = peak_context(offered.prompts, roomy.token_times)
    pool = BLOCK * arguments.pool_blocks
    print(f"pool {pool} tokens of {peak:.0f} offered", flush=True)
    rows, raw = run_all(arguments, offered, slo_s)
    raw |= {
        "offered_context_peak_tokens": peak,
        "full_step_s": step_s,
        "tpot_slo_s": slo_s,
        "rate": rate,
        "arrival_s": offered.arrivals,
        "prompt_tokens": list(map(len, offered.prompts)),
        "output_tokens": list(map(len, offered.expected)),
        "roomy": asdict(measure(offered.arrivals, roomy.token_times, slo_s)),
    }
    about = ABOUT.format(
        model=arguments.model.name,
        dtype=arguments.dtype,
        widened="" if is_packable(getattr(torch, arguments.dtype)) else ", linear layers in float32,",
        threads=arguments.threads,
        requests=arguments.requests,
        rate=rate,
        cv=arguments.cv,
        prompt=fmean(map(len, offered.prompts)),
        output=fmean(map(len, offered.expected)),
        cap=arguments.cap,
        pool=pool,
        fitted=fitted_policy(arguments.policies),
        offered=peak,
        slo=1e3 * slo_s,
        ratio=arguments.slo_ratio,
    )
    result = Result(
        name=arguments.name,
        title="Scheduling policies on a starved pool, real CPU engine",
        about=about,
        command=command_line("ellm.loadtest.starved_pool"),
        rows=rows,
        seed=arguments.seed,
        notes=step_fit.notes_of(raw),
        raw=raw,
    )
    print(f"wrote {result.write()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
