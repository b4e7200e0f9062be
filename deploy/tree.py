"""The configuration as a tree of frozen dataclasses, its short names, and what makes it impossible.

Knows nothing of where values come from: `config.py` reads them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from ellm.cluster.api.config import ControllerConfig
from ellm.deploy import schema
from ellm.router.config import RouterConfig
from ellm.router.keys import check_plain_key
from ellm.worker.api.config import SIMULATED, WorkerConfig, served_name
from ellm.worker.api.errors import ConfigError

MODELS = "models"  # of a file: several models, each with settings of its own
REDACTED = "<redacted>"  # stands for a key where the configuration is shown
OF_A_MODEL = ("cluster.num_workers", "cluster.min_workers", "cluster.max_workers")  # beside worker.*


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """How many of what run where."""

    address: str | None = None  # of a running Ray cluster ("auto": this machine's); None: a Ray of our own
    num_workers: int = 2
    min_workers: int | None = None  # with max_workers: how far it may shrink when idle; None: num_workers
    max_workers: int | None = None  # how far it may grow under load; None: num_workers
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    haproxy: bool = True  # HTTP comes in through HAProxy; false: Ray Serve's own proxy
    dashboard: bool = False  # of the Ray we start
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"  # json: one object per line, one line per request too
    worker_num_cpus: float = 0.5  # logical CPUs of a rank on a CPU, for Ray's placement
    start_timeout_s: float = 600.0  # until every worker has loaded its weights
    object_store_bytes: int = 128 * 1024 * 1024  # of the Ray we start; the data path hardly uses it


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One of the models that the cluster serves, with workers of its own."""

    worker: WorkerConfig
    num_workers: int
    min_workers: int
    max_workers: int

    @property
    def name(self) -> str:
        return served_name(self.worker.model)


@dataclass(frozen=True, slots=True)
class EllmConfig:
    """Everything that can be set."""

    worker: WorkerConfig = field(default_factory=WorkerConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    models: tuple[ServedModel, ...] = field(default=(), metadata={schema.APART: True})  # see `served`

    @property
    def served(self) -> tuple[ServedModel, ...]:
        """What `models` of a file lists, or the one model of `worker`."""
        return self.models or (make_served(self.worker, self.cluster),)


def worker_deployment(config: EllmConfig, model: ServedModel) -> str:
    """The name of the model's deployment in Serve."""
    return "Worker" if len(config.served) == 1 else "Worker-" + re.sub(r"[^A-Za-z0-9._-]", "_", model.name)


def make_served(worker: WorkerConfig, cluster: ClusterConfig) -> ServedModel:
    """A model with as many workers as `cluster` says."""
    count = cluster.num_workers
    least = count if cluster.min_workers is None else cluster.min_workers
    most = count if cluster.max_workers is None else cluster.max_workers
    return ServedModel(worker, count, least, most)


# Short names, for every source.
ALIASES = {
    "model": "worker.model.path",
    "served_model_name": "worker.model.name",
    "revision": "worker.model.revision",
    "device": "worker.model.device",
    "dtype": "worker.model.dtype",
    "max_model_len": "worker.model.max_model_len",
    "kv_blocks": "worker.cache.num_blocks",
    "block_size": "worker.cache.block_size",
    "tp": "worker.tensor_parallel_size",
    "threads": "worker.num_threads",
    "workers": "cluster.num_workers",
    "min_workers": "cluster.min_workers",
    "max_workers": "cluster.max_workers",
    "routers": "router.num_replicas",
    "policy": "worker.scheduler.policy",
    "tpot_slo_ms": "worker.scheduler.tpot_slo_ms",
    "ttft_slo_ms": "worker.scheduler.ttft_slo_ms",
    "routing_policy": "router.policy",
    "pace_streams": "router.pace_streams",
    "api_keys": "router.api_keys",
    "address": "cluster.address",
    "host": "cluster.host",
    "port": "cluster.port",
    "grpc_port": "cluster.grpc_port",
    "log_level": "cluster.log_level",
    "log_format": "cluster.log_format",
}

# path -> (lowest, highest) of numbers that would otherwise fail late or never.
BOUNDS: dict[str, tuple[float, float]] = {
    "cluster.num_workers": (1, 4096),
    "cluster.min_workers": (1, 4096),
    "cluster.max_workers": (1, 4096),
    "controller.tick_s": (0.05, 60),
    "controller.valid_s": (1, 3600),
    "controller.smoothing_s": (0.01, 3600),
    "controller.silent_s": (0.5, 3600),
    "controller.stall_s": (0.5, 86400),
    "controller.router_gone_s": (2.0, 3600),  # routers speak once a second
    "controller.plan_s": (0.0, 3600),
    "controller.held_back_s": (1.0, 86400),
    "controller.scaling.min_attainment": (0.0, 1.0),
    "controller.scaling.up_after_s": (0.0, 3600),
    "controller.scaling.down_after_s": (0.0, 86400),
    "controller.scaling.cool_down_s": (0.0, 86400),
    "controller.scaling.target_load": (0.05, 1.0),
    "controller.scaling.high_load": (0.05, 10.0),
    "controller.scaling.low_load": (0.0, 1.0),
    "controller.scaling.backlog_s": (0.01, 3600),
    "cluster.port": (1, 65535),
    "cluster.grpc_port": (1, 65535),
    "cluster.worker_num_cpus": (0, 1024),
    "cluster.start_timeout_s": (1, 86400),
    "router.num_replicas": (1, 1024),
    "router.pace_max_hold_s": (0.0, 3600.0),
    "router.pace_max_hold_tokens": (0, 1 << 20),
    "router.limits.max_headers": (8, 100_000),
    "router.limits.max_header_bytes": (1024, 1 << 24),
    "router.limits.receive_timeout_s": (0.1, 3600),
    "router.limits.max_unread_bytes": (1024, 1 << 40),
    "router.limits.min_slo_ms": (0.001, 3_600_000),
    "router.limits.max_slo_ms": (0.001, 3_600_000),
    "router.limits.min_priority": (-(2**31 - 1), 2**31 - 1),
    "router.limits.max_priority": (-(2**31 - 1), 2**31 - 1),
    "router.limits.max_json_blanks": (0, 1000),
    "worker.tensor_parallel_size": (1, 64),
    "worker.num_threads": (1, 1024),
    "worker.tp_overlap_rows": (2, 1 << 20),
    "worker.cuda_graph_rows": (0, 1 << 13),
    "worker.model.max_model_len": (1, 1 << 24),
    "worker.cache.block_size": (1, 1024),
    "worker.cache.num_blocks": (2, 1 << 31),
    "worker.cache.memory_fraction": (0.01, 1.0),
    "worker.cache.host_bytes": (0, 1 << 50),
    "worker.cache.transient_blocks": (0, 1 << 24),
    "worker.scheduler.max_num_seqs": (1, 65536),
    "worker.scheduler.max_step_tokens": (1, 1 << 24),
    "worker.scheduler.max_waiting": (1, 1 << 24),
    "worker.scheduler.watermark": (0.0, 0.9),
    "worker.scheduler.pipeline_depth": (1, 2),
    "worker.scheduler.tpot_slo_ms": (0.01, 3_600_000),
    "worker.scheduler.ttft_slo_ms": (0.01, 3_600_000),
}

TYPES = dict(schema.leaf_types(EllmConfig))


def validate(config: EllmConfig) -> None:
    """Refuse numbers out of bounds and settings that contradict each other. Raises ConfigError."""
    leaves = schema.unbuild(config)
    for path, (low, high) in BOUNDS.items():
        value = leaves[path]
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{path}: {value} is not between {low} and {high}", param=path)
    load = config.controller.scaling
    if not load.low_load < load.target_load < load.high_load:
        raise ConfigError(
            f"low_load = {load.low_load:g}, target_load = {load.target_load:g} and high_load ="
            f" {load.high_load:g} must rise",
            param="controller.scaling.target_load",
        )
    _check_models(config)
    limits = config.router.limits
    for what, least, most in (
        ("slo_ms", limits.min_slo_ms, limits.max_slo_ms),
        ("priority", limits.min_priority, limits.max_priority),
    ):
        if least > most:
            name = f"router.limits.min_{what}"
            raise ConfigError(f"{name} is above router.limits.max_{what}", param=name)
    _check_keys(config.router)
    if config.cluster.grpc_port == config.cluster.port:
        raise ConfigError("cluster.grpc_port and cluster.port are the same port", param="cluster.grpc_port")


def _check_keys(router: RouterConfig) -> None:
    if REDACTED in (*router.api_keys, router.admin_key):
        raise ConfigError(f"{REDACTED} is no key: put in the real one", param="router.api_keys")
    for index, key in enumerate(router.api_keys):
        check_plain_key(key, f"router.api_keys[{index}]")
    if router.admin_key is not None:
        check_plain_key(router.admin_key, "router.admin_key")


def _check_models(config: EllmConfig) -> None:
    deployments: dict[str, str] = {}
    for model in config.served:
        other = deployments.setdefault(worker_deployment(config, model), model.name)
        if other != model.name:
            raise ConfigError(
                f"the models {other} and {model.name} would have one deployment name; rename one",
                param=MODELS,
            )
        if model.worker.model.path.startswith(SIMULATED) and model.worker.tensor_parallel_size > 1:
            raise ConfigError(f"{model.name}: a simulated model has one rank", param="tp")
        if not model.min_workers <= model.num_workers <= model.max_workers:
            raise ConfigError(
                f"{model.name}: {model.num_workers} workers are not between min_workers = {model.min_workers}"
                f" and max_workers = {model.max_workers}",
                param="cluster.num_workers",
            )
        if model.min_workers < model.max_workers and not config.controller.enabled:
            raise ConfigError("max_workers needs the controller", param="controller.enabled")
