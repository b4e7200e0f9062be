"""The router as Ray Serve runs it: one ASGI application per replica, its workers found by name.

The ingress of the application: HAProxy (or Serve's proxy) hands connections to the replicas, which speak HTTP
themselves. Worker replicas are deployed beside it and never called through Serve.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve

from ellm.router.app import create_app
from ellm.router.config import RouterConfig
from ellm.router.controller_line import RayControllerLine
from ellm.router.replicas import RayDirectory
from ellm.router.simulated_tokenizer import PREFIX, simulated_tokenizer
from ellm.router.tokenizer import Tokenizer
from ellm.worker.api.config import ModelConfig, served_name
from ellm.worker.api.errors import ConfigError

DEPLOYMENT_NAME = "Router"
TOKENIZER_FILES = ["*.json", "*.jinja", "merges.txt"]
# Serve would run the application in a second thread and hand each chunk over a queue: of no use to one that
# never blocks, and several times the cost of a chunk.
ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}


def router_application(
    config: RouterConfig,
    model: ModelConfig,
    workers: serve.Application | None = None,
    find_controller: Callable[[], Any] | None = None,
) -> serve.Application:
    """The Serve application: routers as the ingress, and `workers` deployed with them. `find_controller`
    finds or makes the controller's actor; without it nobody advises."""
    deployment = serve.deployment(
        serve.ingress(_builder(config, model, find_controller))(),
        name=DEPLOYMENT_NAME,
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": ONE_LOOP}},
        # The router's own limits answer with typed errors; Serve's must never be reached first.
        max_ongoing_requests=2 * config.limits.max_inflight + 1000,
        max_queued_requests=-1,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
    )
    application: serve.Application = deployment.bind(*([] if workers is None else [workers]))
    return application


def _builder(
    config: RouterConfig, model: ModelConfig, find_controller: Callable[[], Any] | None
) -> Callable[[], Any]:
    """What Serve calls in each replica."""

    def build() -> Any:
        name = served_name(model)
        source = model if config.tokenizer is None else replace(model, path=config.tokenizer)
        # Serve echoes the request id itself, whatever the application does.
        app = create_app(
            config,
            name,
            load_tokenizer(source),
            RayDirectory(name),
            echo_request_id=False,
            controller=None if find_controller is None else RayControllerLine(find_controller),
        )
        # What is loaded by now stays: the collector need not look at it with every request.
        gc.collect()
        gc.freeze()
        return app

    return build


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
