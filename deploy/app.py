"""The Serve application: one HTTP ingress and the workers behind it.

`build` is what a Serve config names: `import_path: ellm.deploy.app:build`, with the config tree (short names
too) as `args`. `ellm serve` builds the same application from its own config.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from ellm.cluster.actor import find_or_start
from ellm.cluster.api.config import ModelScale
from ellm.deploy.config import from_serve_args
from ellm.deploy.resolve import resolve
from ellm.deploy.tree import EllmConfig, ServedModel, worker_deployment
from ellm.router.deployment import router_application
from ellm.router.replicas import RayDirectory
from ellm.router.rpc.server import Listen
from ellm.worker.supervisor import worker_application


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application of a Serve config's `args`, for the cluster that runs it. The environment of the node
    that builds it wins, as it does over a file. Raises ConfigError."""
    return build_application(resolve(from_serve_args(args)))


def autoscaling(model: ServedModel) -> AutoscalingConfig | None:
    """Serve's config for a model whose number of workers may change."""
    if model.min_workers == model.max_workers:
        return None
    policy = AutoscalingPolicy(
        policy_function="ellm.deploy.autoscaling:FollowController", policy_kwargs={"model": model.name}
    )
    return AutoscalingConfig(
        min_replicas=model.min_workers,
        initial_replicas=model.num_workers,
        max_replicas=model.max_workers,
        upscale_delay_s=0.0,  # the controller takes its time
        downscale_delay_s=0.0,
        policy=policy,
    )


def rank_gpus(model: ServedModel) -> float:
    """That each rank of a worker asks for."""
    return 1.0 if model.worker.model.device == "cuda" else 0.0


def build_application(config: EllmConfig) -> serve.Application:
    """The application of a resolved config. Raises ConfigError."""
    served = config.served
    workers = [
        worker_application(
            model.worker,
            num_workers=model.num_workers,
            rank_cpus=config.cluster.worker_num_cpus,
            rank_gpus=rank_gpus(model),
            name=worker_deployment(config, model),
            autoscaling=autoscaling(model),
        )
        for model in served
    ]
    scales = tuple(ModelScale(model.name, model.min_workers, model.max_workers) for model in served)
    return router_application(
        config.router,
        [model.worker.model for model in served],
        workers,
        partial(find_or_start, RayDirectory, config.controller, scales)
        if config.controller.enabled
        else None,
        None if config.cluster.grpc_port is None else Listen(config.cluster.host, config.cluster.grpc_port),
    )
