"""Turns "auto" and what was left open into values, once, from this machine and the checkpoint.

Asks neither torch nor Ray: a command line must answer at once. On a cluster of several machines the number of
threads stays open: Ray gives each rank as many as it has CPUs (cluster.worker_num_cpus).
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ellm.deploy.tree import EllmConfig
from ellm.router.config import GrpcConfig
from ellm.worker.api.config import ModelConfig, WorkerConfig, served_name
from ellm.worker.api.errors import ConfigError


def resolve(config: EllmConfig) -> EllmConfig:
    """The config with device, STRICT, name and threads decided. Raises ConfigError."""
    here = config.cluster.address is None
    ranks = sum(model.num_workers * model.worker.tensor_parallel_size for model in config.served)
    models = tuple(replace(model, worker=_resolve_one(model.worker, here, ranks)) for model in config.models)
    worker = models[0].worker if models else _resolve_one(config.worker, here, ranks)
    router = config.router
    if router.api_key_file is not None:  # routers start elsewhere
        router = replace(router, api_key_file=_absolute(router.api_key_file))
    router = replace(router, grpc=GrpcConfig(_absolute(router.grpc.tls_cert), _absolute(router.grpc.tls_key)))
    return replace(config, worker=worker, models=models, router=router)


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.abspath(os.path.expanduser(path))


def _resolve_one(worker: WorkerConfig, here: bool, ranks: int) -> WorkerConfig:
    """`ranks` share this machine's cores, of all models together."""
    model = resolve_model(worker.model, here)
    if worker.num_threads is None and model.device == "cpu" and here:
        worker = replace(worker, num_threads=max(1, num_cores() // ranks))
    return replace(worker, model=model)


def resolve_worker(worker: WorkerConfig) -> WorkerConfig:
    """One worker alone on this machine, with all its cores (`ellm generate`)."""
    threads = worker.num_threads or max(1, num_cores() // worker.tensor_parallel_size)
    return replace(worker, model=resolve_model(worker.model, here=True), num_threads=threads)


def resolve_model(model: ModelConfig, here: bool) -> ModelConfig:
    """`here`: it will run on this machine. Raises ConfigError for a device that this machine lacks."""
    device = this_device() if model.device == "auto" else model.device
    if here and device == "cuda" and this_device() != "cuda":
        raise ConfigError("worker.model.device is cuda, but this machine has no NVIDIA GPU", param="device")
    folder = Path(model.path).expanduser()
    path = str(folder.resolve()) if folder.is_dir() else model.path
    return replace(
        model,
        path=path,
        name=served_name(replace(model, path=path)),
        device=device,
        deterministic=strict_default(model, device) if model.deterministic is None else model.deterministic,
    )


def strict_default(model: ModelConfig, device: str) -> bool | None:
    """STRICT on a CPU, off on a GPU; None, which takes what there is and warns, on a CPU without the JIT."""
    if device != "cpu":
        return False
    return True if model.jit is not False and find_spec("numba") is not None else None


def this_device() -> Literal["cpu", "cuda"]:
    """What this machine has, by its device files."""
    return "cuda" if any(Path("/dev").glob("nvidia[0-9]*")) else "cpu"


def num_cores() -> int:
    """Cores that this process may use: its affinity, and the CPU quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
