"""One setting, several policies and seeds: simulate each, in processes side by side, and join the figures.

Figures of several seeds are means; what each seed gave stands beside them.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import product
from statistics import fmean, stdev
from time import monotonic
from typing import Any

from ellm.loadtest.sim.device import profile
from ellm.loadtest.sim.executor import TimedExecutor
from ellm.loadtest.sim.literature import load_block_s, make_policy
from ellm.loadtest.sim.metrics import summarise
from ellm.loadtest.sim.replica import Replica
from ellm.loadtest.sim.setting import Offered, Setting, offer
from ellm.loadtest.sim.slsqp import Slsqp
from ellm.loadtest.sim.workload import SimRequest
from ellm.worker.api.config import CacheConfig, WorkerConfig
from ellm.worker.api.cost_model import CostModel
from ellm.worker.engine.core import EngineCore
from ellm.worker.engine.policies import Policy
from ellm.worker.engine.policies.spec import parse_spec
from ellm.worker.executor.simulated_link import LinkSpeed

_PROGRESS_S = 0.2  # between two words about how far a run is

OnTokens = Callable[[int], None]
Task = tuple[Setting, str, int]  # policy, seed


@dataclass(frozen=True, slots=True)
class Study:
    """What `prepare` has found to be possible."""

    setting: Setting
    policies: list[str]
    offered: dict[int, Offered]  # by seed


def prepare(setting: Setting, policies: list[str], seeds: list[int]) -> Study:
    """Raises ConfigError for whatever could not be simulated, before anything is."""
    setting.check()
    for policy in policies:
        make_core(setting, policy, cost_model=CostModel())
    return Study(setting, policies, {seed: offer(setting, seed) for seed in seeds})


def make_core(
    setting: Setting, policy: str, *, shares: bool = False, cost_model: CostModel | None = None
) -> EngineCore:
    """The real engine's core, as a worker would make it; its cost model has learnt from a profile, or is
    `cost_model`. `shares`: prompts have stretches in common."""
    return _make_core(setting, policy, shares=shares, cost_model=cost_model)[0]


def _make_core(
    setting: Setting, policy: str, *, shares: bool = False, cost_model: CostModel | None = None
) -> tuple[EngineCore, Policy | None]:
    """The policy, too, where it is one of the simulator's own."""
    device = setting.device
    caching = setting.prefix_caching if setting.prefix_caching is not None else shares
    scheduler, policy_object = make_policy(setting.scheduler(policy))
    config = WorkerConfig(
        scheduler=scheduler,
        cache=CacheConfig(
            block_size=setting.block_size, prefix_caching=caching, host_bytes=int(device.host_bytes)
        ),
    )
    if cost_model is None:
        cost_model = profile(
            device.cost(), max_rows=setting.max_step_tokens, max_kv_tokens=device.capacity_tokens
        )
    limits = setting.limits(policy)
    return EngineCore(limits, config, cost_model=cost_model, policy=policy_object), policy_object


def make_executor(setting: Setting, requests: list[SimRequest], policy: str = "adaptive") -> TimedExecutor:
    """It finds a request's true length by its sampling seed, which is the request's number."""
    device = setting.device
    lengths = [request.output_tokens for request in requests]
    link = LinkSpeed(bytes_per_s=device.tp * device.gpu.link_bytes_per_s)
    return TimedExecutor(
        setting.limits(policy),
        device.cost(),
        lambda new: lengths[new.sampling.seed],
        link,
        load_block_s=load_block_s(parse_spec(policy).name, device),
    )


def simulate(setting: Setting, policy: str, seed: int, on_tokens: OnTokens | None = None) -> dict[str, Any]:
    """One policy's figures for one seed."""
    offered = offer(setting, seed)
    requests = offered.requests
    tpot_slo_s = setting.tpot_slo_ms / 1000
    ttft_slo_s = None if setting.ttft_slo_ms is None else setting.ttft_slo_ms / 1000
    shares = any(request.hash_ids for request in requests)
    core, policy_object = _make_core(setting, policy, shares=shares)
    replica = Replica(
        core,
        make_executor(setting, requests, policy),
        requests,
        tpot_slo_s=tpot_slo_s,
        ttft_slo_s=ttft_slo_s,
        on_tokens=on_tokens,
    )
    try:
        trajectory = replica.run()
    except Exception as error:
        error.add_note(f"simulating {policy}, seed {seed}, {setting}")
        raise
    figures = summarise(requests, trajectory, tpot_slo_s, ttft_slo_s)
    if isinstance(policy_object, Slsqp):
        figures |= policy_object.figures()
    return {
        **figures,
        "goodput_of_bound": figures["goodput_tok_s"] / offered.bound_tok_s,
        "throughput_of_bound": figures["throughput_tok_s"] / offered.bound_tok_s,
    }


def simulate_all(
    study: Study, *, jobs: int = 1, on_progress: Callable[[float], None] | None = None
) -> dict[str, Any]:
    """The result file's content. `on_progress` gets the share of all tokens that are done."""
    setting, policies, offered = study.setting, study.policies, study.offered
    seeds = list(offered)
    keys = list(product(policies, seeds))
    weights = [sum(r.output_tokens for r in offered[seed].requests) for _, seed in keys]
    total, tell, done = sum(weights), on_progress or (lambda share: None), 0
    figures: dict[tuple[str, int], dict[str, Any]] = {}
    tasks = [(setting, policy, seed) for policy, seed in keys]

    def on_tokens(count: int) -> None:
        tell((done + count) / total)

    for i, one in run_tasks(tasks, jobs=jobs, on_tokens=on_tokens):
        figures[keys[i]] = one
        done += weights[i]
        tell(done / total)
    device, first = setting.device, offered[seeds[0]]
    return {
        "version": 1,
        "setting": asdict(setting),
        "seeds": seeds,
        "policies": {policy: means([figures[policy, seed] for seed in seeds]) for policy in policies},
        "bound_tok_s": fmean(one.bound_tok_s for one in offered.values()),
        "load": fmean(one.load for one in offered.values()),
        "rate": fmean(len(o.requests) / max(o.requests[-1].arrival_s, 1e-9) for o in offered.values()),
        "left_out": sum(one.num_left_out for one in offered.values()),
        "slo_over_full_step": setting.tpot_slo_ms / 1000 / device.full_step_s,
        "full_step_s": device.full_step_s,
        "pool_over_weights": device.pool_bytes / device.model.weight_bytes,
        "capacity_tokens": device.capacity_tokens,
        "requests": {  # of the first seed
            "arrival_s": [request.arrival_s for request in first.requests],
            "prompt_tokens": [request.prompt_tokens for request in first.requests],
            "output_tokens": [request.output_tokens for request in first.requests],
        },
        "runs": [
            {
                "seed": seed,
                "bound_tok_s": offered[seed].bound_tok_s,
                "load": offered[seed].load,
                "policies": {policy: figures[policy, seed] for policy in policies},
            }
            for seed in seeds
        ],
    }


def run_tasks(
    tasks: list[Task], *, jobs: int = 1, on_tokens: OnTokens | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the task, its figures) as they end, from `jobs` processes. With one, `on_tokens` hears now
    and then how many tokens the present task has."""
    if jobs <= 1 or len(tasks) <= 1:
        for i, task in enumerate(tasks):
            yield i, simulate(*task, on_tokens=_rarely(on_tokens) if on_tokens else None)
        return
    # Spawned: nothing of this process leaks into them.
    with ProcessPoolExecutor(min(jobs, len(tasks)), multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(simulate, *task): i for i, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def means(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every number, over seeds; and the standard deviation of goodput, where there are several."""
    if len(runs) == 1:
        return runs[0]
    result: dict[str, Any] = {}
    for key, value in runs[0].items():
        values = [run[key] for run in runs]
        result[key] = means(values) if isinstance(value, dict) else fmean(values)
    if "goodput_tok_s" in result:
        result["goodput_stdev_tok_s"] = stdev(run["goodput_tok_s"] for run in runs)
    return result


def _rarely(tell: OnTokens) -> OnTokens:
    said = monotonic()

    def on_tokens(count: int) -> None:
        nonlocal said
        if monotonic() - said >= _PROGRESS_S:
            said = monotonic()
            tell(count)

    return on_tokens
