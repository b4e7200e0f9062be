"""Everything that is simulated but the policy and the seed; and what comes in for a seed.

Every policy of a seed gets the same requests at the same times.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from statistics import fmean

from ellm.loadtest.sim.checkpoint import find_model
from ellm.loadtest.sim.device import Device
from ellm.loadtest.sim.literature import host_limits
from ellm.loadtest.sim.metrics import bound_tok_s, capacity_tok_s, realised_load
from ellm.loadtest.sim.presets import find_gpu
from ellm.loadtest.sim.workload import LENGTHS, SimRequest, at_rate, make_requests, with_arrivals
from ellm.worker.api.config import SchedulerConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.engine.plan import ModelLimits
from ellm.worker.engine.policies.spec import parse_spec

HOLES = ("literal", "slsqp")  # policies that are nothing without transient blocks


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything but the policy and the seed."""

    model: str = "llama2-13b"  # or a folder with a config.json
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
    transient_blocks: int | None = None  # None: for the rows of a step, where the policy makes holes
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
        self.check_values()
        self.device.check()

    def check_values(self) -> None:
        """The same but for whether the model fits."""
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
        if self.transient_blocks is not None and self.transient_blocks < 0:
            raise ConfigError(f"--transient-blocks must be at least 0, not {self.transient_blocks}")
        if self.num_requests < 1:
            raise ConfigError(f"--num-requests must be at least 1, not {self.num_requests}")
        if self.rate is not None and self.load is not None:
            raise ConfigError("--rate and --load are two ways to say the same: give one")
        if self.rate is None and self.load is None and self.workload in LENGTHS:
            raise ConfigError("give --rate (requests per second) or --load (share of capacity)")

    def limits(self, policy: str) -> ModelLimits:
        """Raises ConfigError for a policy that cannot be read."""
        name, count, device = parse_spec(policy).name, self.transient_blocks, self.device
        if count is None:
            count = self.step_blocks if name in HOLES else 0
        return host_limits(device.limits(count), name, device)

    @property
    def step_blocks(self) -> int:
        """Blocks that the rows of one step can fill."""
        return self.max_step_tokens // self.block_size

    def scheduler(self, policy: str) -> SchedulerConfig:
        return SchedulerConfig(
            policy=policy,
            max_num_seqs=self.max_num_seqs,
            max_step_tokens=self.max_step_tokens,
            max_waiting=max(4096, self.num_requests),
            watermark=self.watermark,
            pipeline_depth=self.pipeline_depth,
            tpot_slo_ms=self.tpot_slo_ms,
            ttft_slo_ms=self.ttft_slo_ms,
        )


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
    transient = setting.step_blocks if setting.transient_blocks is None else setting.transient_blocks
    room = device.limits(transient).max_model_len  # the same for all policies
    requests, left_out = make_requests(setting.workload, setting.num_requests, seed, room)
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
