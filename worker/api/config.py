"""The worker's part of the config tree. Frozen; "auto" is resolved once, by the loader in deploy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
HostTier = Literal["auto", "copied"]
Switch = Literal["auto", "on", "off"]  # auto: where it has been measured to be faster

SIMULATED = "simulated:"  # a path that begins so takes the simulated executor


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The KV pool and the tiers below it."""

    block_size: int = 16  # tokens
    num_blocks: int | None = None  # None: sized from memory
    memory_fraction: float = 0.9  # of what is free on a GPU; of half the free memory per worker on a CPU
    max_pool_bytes: int | None = None  # an upper bound on the sized pool; on a CPU 1 GiB where unset
    prefix_caching: bool = True
    host_bytes: int = 0  # of the host tier, for KV that left the device; 0: there is none
    host_tier: HostTier = "auto"  # auto: on a CPU, whose memory it is, more of the pool; copied: copies too
    transient_blocks: int = 0  # for holes that are recomputed or streamed within a step; 0: no such modes


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step and of the queue."""

    policy: str = "adaptive"
    max_num_seqs: int = 256
    max_step_tokens: int = 2048  # rows of one step: decode first, then prefill chunks
    max_waiting: int = 4096  # requests; beyond it submission is refused
    watermark: float = 0.01  # share of blocks kept free when a waiting request is admitted
    pipeline_depth: int = 2  # plans outstanding, 1 or 2
    tpot_slo_ms: float | None = None  # of requests that bring none: time per output token
    ttft_slo_ms: float | None = None  # of requests that bring none: time to the first token


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which checkpoint, and how it is run."""

    path: str = ""  # a local folder or a hub id
    revision: str | None = None
    name: str | None = None  # served as; None: the folder's name
    dtype: DType = "auto"
    device: Device = "auto"
    max_model_len: int | None = None  # None: what the checkpoint allows
    deterministic: bool | None = None  # STRICT; None: on for CPU, off for CUDA
    jit: bool | None = None  # the numba kernels; None: where numba is present
    seed: int = 0  # of requests that bring none, in `ellm generate`


def served_name(model: ModelConfig) -> str:
    """What clients call the model: the name given, or the last part of its path."""
    if model.name is not None:
        return model.name
    if model.path.startswith(SIMULATED):
        return SIMULATED.rstrip(":")
    return model.path.rstrip("/").rpartition("/")[2] or model.path


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker: one tensor-parallel group that serves one model."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    tensor_parallel_size: int = 1
    num_threads: int | None = None  # CPU threads of a rank; None: cores / workers on the node
    heartbeat_s: float = 0.1
    router_lease_s: float = 5.0  # a router silent for so long has its requests aborted
    stall_s: float = 30.0  # work without a finished step for so long: unhealthy
    drain_timeout_s: float = 60.0
    outbox_items: int = 256  # stream items a router may lag behind before its stream is cut
    profile: bool = True  # measure a few steps at start, unless this machine has done so before
    min_step_s: float = 0.0  # a step takes so long at least: a CPU worker that leaves the machine to others
    tp_overlap: bool = False  # of a large step one half communicates while the other computes
    tp_overlap_rows: int = 256  # a step of fewer rows is not worth two halves: each reads all the weights
    fused_attention: Switch = "auto"  # GPU: rows of a hole and decode rows share a launch of attention
    recompute_ahead: Switch = "off"  # rows of a hole run one layer ahead, on a GPU on a stream of their own
    decode_tapes: bool = True  # CPU: a decode step's kernels are recorded once and launched by one call
    cuda_graphs: bool = False  # GPU: steps are recorded at start and replayed
    cuda_graph_rows: int = 0  # of steps that are not decode rows alone, up to so many rows; 0: none of them
