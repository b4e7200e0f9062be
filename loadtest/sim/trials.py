"""Short simulations behind an advice: the chosen layout at a few rates, with and without a host tier.

All policies of a rate get the same requests. They are few: differences of a percent or two mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ellm.loadtest.sim.run import prepare, run_tasks
from ellm.loadtest.sim.setting import Setting, offer

SEED = 1
BASELINE, OURS = "full-chunked", "adaptive"


@dataclass(frozen=True, slots=True)
class Partial:
    """Partial caching as it is tried."""

    policy: str
    transient_blocks: int  # for the holes of all that fit
    streams: bool  # part of every hole comes from the host


@dataclass(frozen=True, slots=True)
class Trial:
    """One policy at one rate. Names are those of the result file."""

    rate: float  # requests per second that came
    load: float  # as a share of the capacity that arithmetic gives
    policy: str
    host_gb: float
    throughput_tok_s: float
    goodput_tok_s: float
    slo_attainment: float
    ttft_mean_s: float
    ttft_p99_s: float
    tpot_mean_s: float
    preemptions: float
    parks: float
    recomputed_per_output_token: float


def run_trials(
    setting: Setting,
    rates: Sequence[float],
    requests_s: float,
    host_gb: float,
    partial: Partial | None = None,
    *,
    jobs: int = 1,
    on_progress: Callable[[float], None] | None = None,
) -> list[Trial]:
    """At each of `rates`: the baseline and the elastic policy without a host tier, the elastic one with
    `host_gb` where that is above 0, and `partial` where it is given. `requests_s` is the capacity. Raises
    ConfigError for what cannot be simulated."""
    tasks, loads = [], []
    for rate in rates:
        bare = replace(setting, rate=rate, load=None, host_gb=0.0)
        variants = [(bare, BASELINE), (bare, OURS)]
        if host_gb:
            variants.append((replace(bare, host_gb=host_gb), OURS))
        if partial is not None:
            gb = host_gb if partial.streams else 0.0
            holed = replace(bare, host_gb=gb, transient_blocks=partial.transient_blocks)
            variants.append((holed, partial.policy))
        for variant, policy in variants:
            prepare(variant, [policy], [SEED])
            tasks.append((variant, policy, SEED))
        requests = offer(bare, SEED).requests
        loads.append(len(requests) / max(requests[-1].arrival_s, 1e-9))
    total, done = len(tasks), 0
    tokens = sum(request.output_tokens for request in requests)
    tell = on_progress or (lambda share: None)

    def on_tokens(count: int) -> None:
        tell((done + min(1.0, count / tokens)) / total)

    figures: dict[int, dict[str, Any]] = {}
    for i, one in run_tasks(tasks, jobs=jobs, on_tokens=on_tokens):
        figures[i] = one
        done += 1
        tell(done / total)
    per_rate = total // len(rates)
    keys = {field.name for field in fields(Trial)}
    return [
        Trial(
            rate=loads[i // per_rate],
            load=loads[i // per_rate] / requests_s,
            policy=policy,
            host_gb=variant.host_gb,
            **{key: value for key, value in figures[i].items() if key in keys},
        )
        for i, (variant, policy, _) in enumerate(tasks)
    ]
