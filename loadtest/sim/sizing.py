"""What a group of GPUs holds and serves of a workload, by arithmetic: memory, steps, requests per second.

In the long run every request that ends makes room for one that starts, so a step has `running` decode rows
and, for each, mean prompt / mean output rows of prompts. That step, by the device's cost model, gives the
rate. Nothing here knows queues, bursts or policies: the simulator does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean

from ellm.loadtest.sim.device import Device
from ellm.loadtest.sim.metrics import bound_tok_s, context_read
from ellm.loadtest.sim.workload import SimRequest
from ellm.worker.api.cost_model import CostModel, StepFeatures
from ellm.worker.engine.planner.admission import TIMELY
from ellm.worker.engine.planner.literal import best_ratio, may_pay, output_rate
from ellm.worker.engine.planner.slack import duty, seconds_per_token

_BISECTIONS = 30


@dataclass(frozen=True, slots=True)
class Demand:
    """A workload's requests in the mean, in tokens."""

    prompt_tokens: float
    output_tokens: float
    context_tokens: float  # that a request holds in a decode step
    prompt_pairs: float  # (query, key) pairs of a prompt's attention

    @classmethod
    def of(cls, requests: Sequence[SimRequest]) -> Demand:
        outputs = sum(r.output_tokens for r in requests)
        return cls(
            fmean(r.prompt_tokens for r in requests),
            outputs / len(requests),
            context_read(requests) / outputs,
            fmean(0.5 * r.prompt_tokens * (r.prompt_tokens + 1) for r in requests),
        )


@dataclass(frozen=True, slots=True)
class Sizing:
    """One way to lay a model out. The field names are those of the file that `ellm plan --json` writes."""

    tp: int
    weight_bytes: float
    pool_bytes: float
    kv_token_bytes: int
    capacity_tokens: int  # N
    full_step_s: float  # T0: a decode step that reads all memory
    slo_over_full_step: float
    pool_over_weights: float  # M / w
    capacity_gain_limit: float  # 1 + w / M: what unlimited KV memory could gain at most
    requests_held: float  # that fit in memory, at the context they have in the mean
    running: float  # that a step has at capacity: memory, max_num_seqs and the SLO allow no more
    limited_by: str  # "memory", "max_num_seqs" or "slo"
    step_s: float  # at capacity, prompts included
    bound_tok_s: float  # memory full, prompts for free, any SLO
    capacity_tok_s: float  # 0 where not even one request keeps the SLO
    capacity_requests_s: float
    capacity_tok_s_per_gpu: float
    phi: float  # admitted over running, if whoever is ahead of its deadline pauses: as the planner counts
    phi_tokens: float  # of KV beyond N that they would hold


@dataclass(frozen=True, slots=True)
class Prices:
    """What it takes to have one token's KV back, and what that says about leaving it out of memory."""

    recompute_s: float  # C_rec
    link_s: float  # C_link
    read_s: float  # to read it from GPU memory
    literal_limit_tokens: float  # T0 / C_rec: per-step recompute pays below this many tokens of memory
    literal_limit_with_link_tokens: float  # T0 (1 / C_rec + 1 / C_link)
    stream_share: float  # of the tokens left out that the link brings, if both paths are to end together
    literal_may_pay: bool
    literal_with_link_may_pay: bool


def size(device: Device, requests: Sequence[SimRequest], tpot_slo_s: float, max_num_seqs: int) -> Sizing:
    """`device` serving `requests` for ever. Raises ConfigError for a device on which the model does not
    fit."""
    device.check()
    demand, cost = Demand.of(requests), device.cost()
    per_token_s = seconds_per_token(tpot_slo_s)
    assert per_token_s is not None
    capacity = device.capacity_tokens
    held = capacity / demand.context_tokens
    most = min(held, float(max_num_seqs))
    running = timely_running(cost, demand, most, TIMELY * per_token_s)
    limited_by = "memory" if held <= max_num_seqs else "max_num_seqs"
    if running < most:
        limited_by = "slo"
    step_s = mean_step_s(cost, demand, running if running else 1.0)
    rate = running / step_s
    phi = 1.0 / duty(0.0, 1.0, per_token_s, mean_step_s(cost, demand, most))
    return Sizing(
        tp=device.tp,
        weight_bytes=device.model.weight_bytes,
        pool_bytes=device.pool_bytes,
        kv_token_bytes=device.model.kv_token_bytes,
        capacity_tokens=capacity,
        full_step_s=device.full_step_s,
        slo_over_full_step=tpot_slo_s / device.full_step_s,
        pool_over_weights=device.pool_bytes / device.model.weight_bytes,
        capacity_gain_limit=1.0 + device.model.weight_bytes / device.pool_bytes,
        requests_held=held,
        running=running,
        limited_by=limited_by,
        step_s=step_s,
        bound_tok_s=bound_tok_s(requests, device),
        capacity_tok_s=rate,
        capacity_requests_s=rate / demand.output_tokens,
        capacity_tok_s_per_gpu=rate / device.tp,
        phi=phi,
        phi_tokens=max(0.0, phi * most * demand.context_tokens - capacity),
    )


def mean_step_s(cost: CostModel, demand: Demand, running: float) -> float:
    """A step with `running` decode rows and the rows of prompts that come with them in the long run. Linear
    between whole rows, so that what is found by bisection is exact."""
    low = int(running)
    share = running - low
    here = _step_s(cost, demand, low)
    return here if not share else (1.0 - share) * here + share * _step_s(cost, demand, low + 1)


def timely_running(cost: CostModel, demand: Demand, most: float, limit_s: float) -> float:
    """The most decode rows with steps of at most `limit_s`; 0 if one alone takes longer."""
    if mean_step_s(cost, demand, most) <= limit_s:
        return most
    low, high = min(1.0, most), most
    if mean_step_s(cost, demand, low) > limit_s:
        return 0.0
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if mean_step_s(cost, demand, middle) <= limit_s:
            low = middle
        else:
            high = middle
    return low


def prices(device: Device) -> Prices:
    """By the literal formula N < T0 (1 / C_rec + 1 / C_link), as `planner.literal` has it."""
    full_step_s, recompute_s = device.full_step_s, device.row_s
    link_s = device.model.kv_token_bytes / (device.tp * device.gpu.link_bytes_per_s)
    count = device.capacity_tokens
    return Prices(
        recompute_s,
        link_s,
        device.kv_token_s,
        full_step_s / recompute_s,
        full_step_s * (1.0 / recompute_s + 1.0 / link_s),
        recompute_s / (recompute_s + link_s),
        may_pay(count, full_step_s, recompute_s),
        may_pay(count, full_step_s, recompute_s, link_s),
    )


def literal_ratio(
    device: Device, demand: Demand, limit_s: float, max_rows: int, stream: float = 0.0
) -> float:
    """The share of every request that the best plan leaves uncached and brings back in each step, `stream` of
    that by the link and the rest by recompute, by the cost model; 0 where none beats full caching by 2 %.
    Steps take at most `limit_s` and `max_rows`."""
    cost = device.cost()
    link_s = device.model.kv_token_bytes / (device.tp * device.gpu.link_bytes_per_s)

    def step_time(rows: float, uncached: float, context: float) -> float:
        recompute = (1.0 - stream) * uncached
        if rows + recompute > max_rows:
            return inf
        # It is the front of a request: its tokens attend to half of it in the mean.
        pairs = 0.5 * recompute * recompute / max(rows, 1.0)
        features = StepFeatures(
            round(rows + recompute), round(rows), round(context), round(pairs), round(rows)
        )
        return max(cost.predict(features), stream * uncached * link_s)

    def rate(ratio: float) -> float:
        return output_rate(
            ratio,
            num_tokens=device.capacity_tokens,
            mean_tokens=demand.context_tokens,
            num_wanted=1_000_000,
            step_time=step_time,
            limit_s=limit_s,
        )

    return best_ratio(rate)


def best_layout(sizings: Sequence[Sizing]) -> Sizing:
    """The most tokens per second and GPU; of those within 3 %, the fewest GPUs."""
    most = max(one.capacity_tok_s_per_gpu for one in sizings)
    return min((one for one in sizings if one.capacity_tok_s_per_gpu >= 0.97 * most), key=lambda s: s.tp)


def first_token_s(device: Device, demand: Demand) -> float:
    """The mean prompt alone on an idle device, in one step."""
    rows = max(1, round(demand.prompt_tokens))
    return device.cost().predict(StepFeatures(rows, 0, rows, int(demand.prompt_pairs), 1))


def _step_s(cost: CostModel, demand: Demand, running: int) -> float:
    per_output = running / demand.output_tokens
    prompts, pairs = per_output * demand.prompt_tokens, per_output * demand.prompt_pairs
    context = running * demand.context_tokens + prompts
    return cost.predict(
        StepFeatures(round(running + prompts), running, round(context), round(pairs), running)
    )
