"""What an engine does when there is always somebody to run, measured: a profile at start is of a moment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median

from ellm.loadtest.open_loop import OpenLoopRun, run_open_loop
from ellm.loadtest.unforeseen import Offered
from ellm.worker.build import LoadedEngine

FULL = 0.85  # of the pool: from here on it counts as full


@dataclass(frozen=True, slots=True)
class Saturated:
    """`full_step_s`: the median step with the pool full in which all decode."""

    output_tok_s: float
    full_step_s: float


def measure_saturated(
    engine: LoadedEngine, offered: Offered, num_requests: int, full: float = FULL
) -> Saturated:
    """The first `num_requests` at once; closes the engine. Raises RuntimeError if the pool never fills."""
    some = replace(
        offered,
        arrivals=[0.0] * num_requests,
        prompts=offered.prompts[:num_requests],
        expected=offered.expected[:num_requests],
    )
    limits = engine.executor.limits
    run = run_open_loop(engine, some.requests(None), some.arrivals)
    return Saturated(middle_rate(run), full_step(run, limits.num_blocks * limits.block_size, full))


def middle_rate(run: OpenLoopRun) -> float:
    """Output tokens per second while the middle eight tenths of them came."""
    times = sorted(at for own in run.token_times for at in own)
    tenth = len(times) // 10
    return (len(times) - 2 * tenth - 1) / (times[-tenth - 1] - times[tenth])


def full_step(run: OpenLoopRun, pool_tokens: int, full: float = FULL) -> float:
    steps = [
        step.elapsed_s
        for step in run.steps
        if step.kind == "decode only" and step.features.kv_tokens >= full * pool_tokens
    ]
    if not steps:
        raise RuntimeError("the pool never fills: more requests, or a smaller pool")
    return median(steps)
