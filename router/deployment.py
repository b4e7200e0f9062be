"""The router as Ray Serve runs it: one ASGI application per replica, its workers found by name.

The ingress of the application: HAProxy (or Serve's proxy) hands connections to the replicas, which speak HTTP
themselves. Worker replicas are deployed beside it and never called through Serve.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve
from ray.util import metrics as ray_metrics

from ellm.router.app import ModelSource, create_app
from ellm.router.config import ROUTER_CPUS, RouterConfig
from ellm.router.controller_line import RayControllerLine
from ellm.router.metrics_declared import DECLARED
from ellm.router.metrics_sharing import Outlet
from ellm.router.replicas import RayDirectory
from ellm.router.request_heads import bound_heads
from ellm.router.rpc.server import Listen, check_listen, with_rpc
from ellm.router.simulated_tokenizer import PREFIX, simulated_tokenizer
from ellm.router.tokenizer import Tokenizer
from ellm.worker.api import json_log
from ellm.worker.api.config import ModelConfig, served_name
from ellm.worker.api.errors import ConfigError
from ellm.worker.api.metric_export import MetricExport

log = logging.getLogger(__name__)

DEPLOYMENT_NAME = "Router"
TOKENIZER_FILES = ["*.json", "*.jinja", "merges.txt"]
# Serve would run the application in a second thread and hand each chunk over a queue: of no use to one that
# never blocks, and several times the cost of a chunk.
ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}


def router_application(
    config: RouterConfig,
    models: Sequence[ModelConfig],
    workers: Sequence[serve.Application] = (),
    find_controller: Callable[[], Any] | None = None,
    grpc: Listen | None = None,
) -> serve.Application:
    """The Serve application: routers as the ingress, and `workers` deployed with them. `find_controller`
    finds or makes the controller's actor; without it nobody advises. `grpc` is where each router serves that,
    on its own node; None: it does not."""
    deployment = serve.deployment(
        serve.ingress(_builder(config, tuple(models), find_controller, grpc))(),
        name=DEPLOYMENT_NAME,
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": ROUTER_CPUS, "runtime_env": {"env_vars": ONE_LOOP}},
        # The router's own limits answer with typed errors; Serve's must never be reached first.
        max_ongoing_requests=2 * config.limits.max_inflight + 1000,
        max_queued_requests=-1,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
    )
    application: serve.Application = deployment.bind(*workers)
    return application


def _builder(
    config: RouterConfig,
    models: Sequence[ModelConfig],
    find_controller: Callable[[], Any] | None,
    grpc: Listen | None,
) -> Callable[[], Any]:
    """What Serve calls in each replica."""

    def build() -> Any:
        json_log.install("router")
        bound_heads(config.limits)
        sources, broken = load_sources(models, config.tokenizer)
        line = None if find_controller is None else RayControllerLine(find_controller)
        app = create_app(
            config,
            sources,
            broken=broken,
            controller=line,
            outlet=Outlet(line, MetricExport(ray_metrics, DECLARED)),
            echo_request_id=False,  # Serve does it itself, whatever the application does
        )
        if grpc is not None:
            check_listen(grpc)  # here an error keeps its words: of one in the lifespan Serve tells nothing
            with_rpc(app, config, grpc)
        # What is loaded by now stays: the collector need not look at it with every request.
        gc.collect()
        gc.freeze()
        return app

    return build


def load_sources(
    models: Sequence[ModelConfig], tokenizer: str | None
) -> tuple[list[ModelSource], dict[str, str]]:
    """The models that can be served, and why others cannot. `tokenizer` is for the one model there is. Raises
    ConfigError when none can."""
    sources: list[ModelSource] = []
    broken: dict[str, str] = {}
    for model in models:
        name = served_name(model)
        source = model if tokenizer is None else replace(model, path=tokenizer)
        try:
            sources.append(ModelSource(name, load_tokenizer(source), RayDirectory(name)))
        except ConfigError as error:
            if len(models) == 1:
                raise
            log.error("the model %s cannot be served: %s", name, error.message)
            broken[name] = error.message
    if not sources:
        raise ConfigError("; ".join(f"{name}: {reason}" for name, reason in broken.items()))
    return sources, broken


def load_tokenizer(model: ModelConfig) -> Tokenizer:
    """From the checkpoint's folder, or from the hub where the model is a hub id. Raises ConfigError."""
    if model.path.startswith(PREFIX):
        return simulated_tokenizer(model.path)
    folder = Path(os.path.expanduser(model.path))
    if folder.is_dir():
        return Tokenizer.load(folder)
    from huggingface_hub import snapshot_download  # half a second, and a folder needs none of it

    try:
        found = snapshot_download(model.path, revision=model.revision, allow_patterns=TOKENIZER_FILES)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ConfigError(f"the tokenizer of {model.path} cannot be had: {reason}") from None
    return Tokenizer.load(Path(found))
