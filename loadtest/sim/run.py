"""One setting, several policies and seeds: simulate each in a process of its own, and join the figures.

Every policy of a seed gets the same requests at the same times. Figures of several seeds are means; what each
seed gave stands beside them.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import product
from math import isfinite
from statistics import fmean, stdev
from time import monotonic
from typing import Any

from ellm.loadtest.sim.device import Device, profile
from ellm.loadtest.sim.executor import TimedExecutor
from ellm.loadtest.sim.metrics import bound_tok_s, capacity_tok_s, realised_load, summarise
from ellm.loadtest.sim.presets import find_gpu, find_model
from ellm.loadtest.sim.replica import Replica
from ellm.loadtest.sim.workload import LENGTHS, SimRequest, at_rate, make_requests, with_arrivals
from ellm.worker.api.config import CacheConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.engine.core import EngineCore
from ellm.worker.engine.policies import resolve_config
from ellm.worker.executor.simulated_link import LinkSpeed

_PROGRESS_S = 0.2  # between two words of a process about how far it is

OnTokens = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything but the policy and the seed."""

    model: str = "llama2-13b"
    gpu: str = "a100-80g"
    workload: str = "sharegpt"  # or a trace file
    num_requests: int = 600
    rate: float | None = None  # requests per second; one of rate and load, or neither for a trace
    load: float | None = None  # share of capacity
    cv: float = 1.7
    tpot_slo_ms: float = 50.0
    ttft_slo_ms: float | None = None
    kv_bytes: float | None = None
    host_gb: float = 0.0
    tp: int = 1
    block_size: int = 16
    max_num_seqs: int = 256
    max_step_tokens: int = 2048
    watermark: float = 0.01
    pipeline_depth: int = 2
    prefix_caching: bool | None = None  # None: where requests share stretches of their prompts

    @property
    def device(self) -> Device:
        return Device(
            find_model(self.model),
            find_gpu(self.gpu),
            self.tp,
            self.kv_bytes,
            self.host_gb * 1e9,
            self.block_size,
        )

    def check(self) -> None:
        """Raise ConfigError for what cannot be simulated, naming the value."""
        positive = {
            "rate": self.rate,
            "load": self.load,
            "tpot-slo-ms": self.tpot_slo_ms,
            "ttft-slo-ms": self.ttft_slo_ms,
            "kv-bytes": self.kv_bytes,
        }
        for name, value in positive.items():
            if value is not None and not (isfinite(value) and value > 0.0):
                raise ConfigError(f"--{name} must be above 0, not {value:g}", param=name)
        for name, value in {"cv": self.cv, "host-gb": self.host_gb}.items():
            if not (isfinite(value) and value >= 0.0):
                raise ConfigError(f"--{name} must be at least 0, not {value:g}", param=name)
        if self.num_requests < 1:
            raise ConfigError(f"--num-requests must be at least 1, not {self.num_requests}")
        if self.rate is not None and self.load is not None:
            raise ConfigError("--rate and --load are two ways to say the same: give one")
        if self.rate is None and self.load is None and self.workload in LENGTHS:
            raise ConfigError("give --rate (requests per second) or --load (share of capacity)")
        self.device.check()

    def scheduler(self, policy: str) -> SchedulerConfig:
        """Raises ConfigError for a policy that there is not."""
        config = SchedulerConfig(
            policy=policy,
            max_num_seqs=self.max_num_seqs,
            max_step_tokens=self.max_step_tokens,
            max_waiting=max(4096, self.num_requests),
            watermark=self.watermark,
            pipeline_depth=self.pipeline_depth,
            tpot_slo_ms=self.tpot_slo_ms,
            ttft_slo_ms=self.ttft_slo_ms,
        )
        resolve_config(config)
        return config


@dataclass(frozen=True, slots=True)
class Offered:
    """What comes in a run."""

    requests: list[SimRequest]
    num_left_out: int  # of a trace: longer than the pool
    bound_tok_s: float
    load: float  # realised: output tokens asked for per second, as a share of capacity


def offer(setting: Setting, seed: int) -> Offered:
    """The requests of this seed; a load becomes a rate by the capacity for the lengths that were drawn."""
    device = setting.device
    requests, left_out = make_requests(
        setting.workload, setting.num_requests, seed, device.limits().num_blocks * device.block_size
    )
    capacity = capacity_tok_s(requests, device, setting.max_num_seqs)
    rate = setting.rate
    if setting.load is not None:
        rate = setting.load * capacity / fmean(request.output_tokens for request in requests)
    if setting.workload in LENGTHS:
        assert rate is not None
        requests = with_arrivals(requests, rate, setting.cv, seed)
    elif rate is not None:
        requests = at_rate(requests, rate)
    return Offered(requests, left_out, bound_tok_s(requests, device), realised_load(requests, capacity))


def make_core(setting: Setting, policy: str, *, shares: bool = False) -> EngineCore:
    """The real engine's core, as a worker would make it; its cost model has learnt from a profile."""
    device = setting.device
    caching = setting.prefix_caching if setting.prefix_caching is not None else shares
    config = WorkerConfig(
        scheduler=setting.scheduler(policy),
        cache=CacheConfig(
            block_size=setting.block_size, prefix_caching=caching, host_bytes=int(device.host_bytes)
        ),
    )
    learnt = profile(device.cost(), max_rows=setting.max_step_tokens, max_kv_tokens=device.capacity_tokens)
    return EngineCore(device.limits(), config, cost_model=learnt)


def make_executor(setting: Setting, requests: list[SimRequest]) -> TimedExecutor:
    """It finds a request's true length by its sampling seed, which is the request's number."""
    device = setting.device
    lengths = [request.output_tokens for request in requests]
    link = LinkSpeed(bytes_per_s=device.tp * device.gpu.link_bytes_per_s)
    return TimedExecutor(device.limits(), device.cost(), lambda new: lengths[new.sampling.seed], link)


def simulate(setting: Setting, policy: str, seed: int, on_tokens: OnTokens | None = None) -> dict[str, Any]:
    """One policy's figures for one seed."""
    offered = offer(setting, seed)
    requests = offered.requests
    tpot_slo_s = setting.tpot_slo_ms / 1000
    ttft_slo_s = None if setting.ttft_slo_ms is None else setting.ttft_slo_ms / 1000
    replica = Replica(
        make_core(setting, policy, shares=any(request.hash_ids for request in requests)),
        make_executor(setting, requests),
        requests,
        tpot_slo_s=tpot_slo_s,
        ttft_slo_s=ttft_slo_s,
        on_tokens=on_tokens,
    )
    trajectory = replica.run()
    figures = summarise(requests, trajectory, tpot_slo_s, ttft_slo_s)
    return {
        **figures,
        "goodput_of_bound": figures["goodput_tok_s"] / offered.bound_tok_s,
        "throughput_of_bound": figures["throughput_tok_s"] / offered.bound_tok_s,
    }


def simulate_all(
    setting: Setting,
    policies: list[str],
    seeds: list[int],
    *,
    jobs: int = 1,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """The result file's content. Raises ConfigError before anything runs. `on_progress` gets the share of all
    tokens that are done."""
    setting.check()
    for policy in policies:
        setting.scheduler(policy)
    offered = {seed: offer(setting, seed) for seed in seeds}
    runs = run_tasks(
        [(setting, policy, seed) for seed, policy in product(seeds, policies)],
        [sum(r.output_tokens for r in offered[seed].requests) for seed, _ in product(seeds, policies)],
        jobs=jobs,
        on_progress=on_progress,
    )
    figures = dict(zip(product(seeds, policies), runs, strict=True))
    device, first = setting.device, offered[seeds[0]]
    return {
        "version": 1,
        "setting": asdict(setting),
        "seeds": seeds,
        "policies": {policy: _means([figures[seed, policy] for seed in seeds]) for policy in policies},
        "bound_tok_s": fmean(one.bound_tok_s for one in offered.values()),
        "load": fmean(one.load for one in offered.values()),
        "rate": fmean(len(o.requests) / max(o.requests[-1].arrival_s, 1e-9) for o in offered.values()),
        "left_out": first.num_left_out,
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
                "policies": {policy: figures[seed, policy] for policy in policies},
            }
            for seed in seeds
        ],
    }


Task = tuple[Setting, str, int]


def run_tasks(
    tasks: list[Task],
    weights: list[int],
    *,
    jobs: int,
    on_progress: Callable[[float], None] | None = None,
) -> list[dict[str, Any]]:
    """`simulate` of each, in order; in `jobs` processes if there are more than one. `weights` are the tokens
    of each."""
    total, tell = max(1, sum(weights)), on_progress or (lambda share: None)
    if jobs <= 1 or len(tasks) == 1:
        results, before = [], 0
        for task, weight in zip(tasks, weights, strict=True):
            results.append(simulate(*task, on_tokens=_rarely(tell, before, total)))
            before += weight
        tell(1.0)
        return results
    results = [{} for _ in tasks]
    for index, result, done in _in_processes(tasks, weights, jobs):
        results[index] = result
        tell(done / total)
    return results


def _in_processes(
    tasks: list[Task], weights: list[int], jobs: int
) -> Iterator[tuple[int, dict[str, Any], int]]:
    """(number, result, tokens done so far) as they end. Spawned: nothing of this process leaks into them."""
    done = 0
    with ProcessPoolExecutor(min(jobs, len(tasks)), multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(simulate, *task): i for i, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                index = futures[future]
                done += weights[index]
                yield index, future.result(), done
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _rarely(tell: Callable[[float], None], before: int, total: int) -> OnTokens:
    said = monotonic()

    def on_tokens(count: int) -> None:
        nonlocal said
        if monotonic() - said >= _PROGRESS_S:
            said = monotonic()
            tell((before + count) / total)

    return on_tokens


def _means(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every number; and the standard deviation of goodput over seeds, where there are several."""
    means: dict[str, Any] = {}
    for key, value in runs[0].items():
        if isinstance(value, dict):
            means[key] = _means([run[key] for run in runs])
        else:
            means[key] = fmean(run[key] for run in runs) if len(runs) > 1 else value
    if len(runs) > 1 and "goodput_tok_s" in runs[0]:
        means["goodput_stdev_tok_s"] = stdev(run["goodput_tok_s"] for run in runs)
    return means
