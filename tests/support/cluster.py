"""A local Ray cluster with Serve for a test module, and what its tests ask of workers on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import ray
from ray import serve

from ellm.router.replicas import RayDirectory
from ellm.router.stream_channel import StreamChannel
from ellm.worker.api.config import ModelConfig, WorkerConfig
from ellm.worker.supervisor import worker_application

APP = "workers"


@contextmanager
def local_cluster(num_cpus: int = 8, http_port: int | None = None) -> Iterator[None]:
    """A cluster of this process's own. Afterwards none of its processes is left, or the test fails."""
    # Actors of the tests find their classes where the tests do.
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    # As in production. With Ray's 15 whatever else runs would starve the workers.
    os.environ.setdefault("RAY_worker_niceness", "0")
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        configure_logging=False,
    )
    started: list[psutil.Process] = []
    try:
        if http_port is None:
            serve.start(proxy_location="Disabled")
        else:
            serve.start(http_options={"host": "127.0.0.1", "port": http_port})
        yield
        started = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
        serve.shutdown()
    finally:
        ray.shutdown()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive, f"left behind: {[(p.pid, p.name()) for p in alive]}"


def simulated_config(step_s: float = 0.005, **changes: float) -> WorkerConfig:
    """Workers that step every `step_s`, with short leases."""
    values: dict[str, float] = {"router_lease_s": 2.0, "stall_s": 3.0, "drain_timeout_s": 10.0} | changes
    return WorkerConfig(model=ModelConfig(path=f"simulated:overhead_s={step_s}"), **values)  # type: ignore[arg-type]


def deploy(config: WorkerConfig, num_workers: int = 1, *, wait: bool = True) -> None:
    """Returns when the workers are ready, or at once."""
    application = worker_application(config, num_workers=num_workers, rank_cpus=0.5)
    target = serve.RunTarget(application, name=APP, route_prefix=None)
    serve.run_many([target], wait_for_ingress_deployment_creation=wait, wait_for_applications_running=wait)


async def workers(directory: RayDirectory) -> list[StreamChannel]:
    return sorted((await directory.refresh()).values(), key=lambda c: c.info.worker_id)


def wait_for(condition: Callable[[], object], timeout_s: float) -> float:
    """Seconds it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, f"waited {timeout_s} s in vain"
        time.sleep(0.02)
    return time.monotonic() - start
