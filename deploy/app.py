"""The Serve application: one HTTP ingress and the workers behind it.

`build` is what a Serve config names: `import_path: ellm.deploy.app:build`, with the config tree (short names
too) as `args`. `ellm serve` builds the same application from its own config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve

from ellm.deploy.config import EllmConfig, from_mapping
from ellm.deploy.resolve import resolve
from ellm.router.deployment import router_application
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
    return router_application(config.router, config.worker.model, workers)
