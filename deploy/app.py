"""The Serve application: one HTTP ingress and the workers behind it.

`build` is what a Serve config names: `import_path: ellm.deploy.app:build`, with the config tree (short names
too) as `args`. `ellm serve` builds the same application from its own config.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ray import serve

from ellm.cluster.actor import find_or_start
from ellm.cluster.api.config import ModelScale
from ellm.deploy.config import EllmConfig, from_mapping
from ellm.deploy.resolve import resolve
from ellm.router.deployment import router_application
from ellm.router.replicas import RayDirectory
from ellm.worker.api.config import served_name
from ellm.worker.supervisor import worker_application


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application of a Serve config's `args`, for the cluster that runs it. Raises ConfigError."""
    return build_application(resolve(from_mapping({"address": "auto", **args})))


def build_application(config: EllmConfig) -> serve.Application:
    """The application of a resolved config. Raises ConfigError."""
    on_gpu = config.worker.model.device == "cuda"
    workers = worker_application(
        config.worker,
        num_workers=config.cluster.num_workers,
        rank_cpus=config.cluster.worker_num_cpus,
        rank_gpus=1.0 if on_gpu else 0.0,
    )
    scale = ModelScale(
        served_name(config.worker.model), config.cluster.num_workers, config.cluster.num_workers
    )
    find_controller = partial(find_or_start, RayDirectory, config.controller, (scale,))
    return router_application(
        config.router,
        config.worker.model,
        workers,
        find_controller if config.controller.enabled else None,
    )
