"""The driver of `ellm serve`: check, start, wait until ready, hold, drain, leave.

`foreground.py` stands before it and clears away what should be left.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import types
from pathlib import Path
from typing import Any

from ellm.deploy import application, ports, ray_cluster, room, workers
from ellm.deploy.announcement import announce, base_url
from ellm.deploy.application import DeployFailed
from ellm.deploy.http_client import RequestFailed, Server
from ellm.deploy.progress import Progress
from ellm.deploy.resolve import num_cores
from ellm.deploy.tree import EllmConfig, ServedModel, worker_deployment
from ellm.router.config import ROUTER_CPUS
from ellm.router.keys import read_keys
from ellm.router.policies import make_policy as router_policy
from ellm.router.rpc import tls
from ellm.worker.api.config import SIMULATED, ModelConfig, WorkerConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.engine.policies import make_policy as engine_policy
from ellm.worker.model.architecture import Architecture
from ellm.worker.model.inspect import inspect_checkpoint

INTERRUPTED = 130
WATCH_S = 2.0
MARGIN_S = 20.0  # for Serve to take down what has drained
FIND_S = 5.0
LOST_S = 30.0  # without an answer from Serve's controller
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # which the foreground process takes


class Stopped(BaseException):
    """SIGINT came while the cluster was starting."""


class Interrupt:
    """SIGINT: raises Stopped while the cluster starts, and sets `asked` from then on."""

    def __init__(self) -> None:
        """Nothing is raised before `listen`, if the signals are blocked."""
        self.asked = threading.Event()
        self.cut_short = False  # the start
        self._starting = True
        signal.signal(signal.SIGINT, self._on_signal)

    def listen(self) -> None:
        """Let the signals through; what is started from now on inherits that. What went to the whole group
        before this process left it is the foreground's to pass on."""
        for name in (signal.SIGTERM, signal.SIGHUP):
            handler = signal.signal(name, signal.SIG_IGN)  # forgets one that waits
            signal.signal(name, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def started(self) -> None:
        self._starting = False

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        self.asked.set()
        if self._starting:
            self._starting = False
            self.cut_short = True
            raise Stopped


def run(config: EllmConfig, parent: int) -> int:
    """Hold a cluster up until SIGINT, or until process `parent` is gone; returns the exit code.

    Raises EllmError.
    """
    progress = Progress()
    interrupt = Interrupt()
    try:
        interrupt.listen()
        start_ray(config, progress)
        start_application(config, progress)
        interrupt.started()
        announce(config)
        lost = watch(interrupt, progress, parent, own=config.cluster.address is None)
        progress.line("Stopping: running requests may end, Ctrl-C again ends them now")
        take_down(config)
    except (Stopped, Exception):
        interrupt.started()  # a signal from now on cuts nothing short
        if not interrupt.cut_short:  # Ray's compiled code makes other errors of what a handler raises
            raise
        progress.line("Stopping")
        return INTERRUPTED
    finally:
        interrupt.started()
        ray_cluster.stop(own=config.cluster.address is None)
        progress.line("Stopped")
    return 1 if lost else 0


def check(config: EllmConfig) -> None:
    """All that can be known to be wrong before anything starts. Raises ConfigError."""
    router_policy(config.router.policy)
    if config.router.api_key_file is not None:
        read_keys(Path(config.router.api_key_file))
    tls.read_pair(config.router.grpc)
    problems = {model.name: problem for model in config.served if (problem := check_model(model.worker))}
    if len(problems) == len(config.served):  # of several, one that cannot be served stops no other
        raise next(iter(problems.values()))
    if config.cluster.address is None:
        ports.check_free(config.cluster.host, config.cluster.port, "port")
        if config.cluster.grpc_port is not None:
            ports.check_free(config.cluster.host, config.cluster.grpc_port, "grpc_port")


def check_model(worker: WorkerConfig) -> ConfigError | None:
    """What is wrong with one model."""
    try:
        engine_policy(worker.scheduler)
        if not worker.model.path.startswith(SIMULATED):
            check_fits(
                worker.model,
                inspect_checkpoint(worker.model.path, worker.model.revision, worker.tensor_parallel_size),
            )
    except ConfigError as error:
        return error
    return None


def check_fits(model: ModelConfig, found: Architecture) -> None:
    """Settings that this checkpoint or device cannot have. Raises ConfigError."""
    if model.device == "cpu" and model.dtype == "float16":
        raise ConfigError("float16 is not supported on a CPU; use bfloat16 or float32", param="dtype")
    if (model.max_model_len or 0) > found.max_model_len:
        raise ConfigError(
            f"max_model_len = {model.max_model_len}: this checkpoint allows at most {found.max_model_len}",
            param="max_model_len",
        )


def start_ray(config: EllmConfig, progress: Progress) -> None:
    """Ray and Serve, ours or the cluster's. Raises EllmError."""
    haproxy = config.cluster.haproxy and ray_cluster.haproxy_works()
    if config.cluster.haproxy and not haproxy:
        progress.line("HAProxy does not run on this machine; Ray Serve's own proxy takes its place")
    if config.cluster.address is None:
        ray_cluster.set_environment(config, haproxy)
    with progress.phase("Ray"):
        progress.note(ray_cluster.start(config, max(num_cores(), needed_cpus(config))))
    proxy = "HAProxy" if haproxy else "its own proxy"
    with progress.phase("Ray Serve" if config.cluster.address else f"Ray Serve with {proxy}"):
        ray_cluster.start_serve(config)


def start_application(config: EllmConfig, progress: Progress) -> None:
    """Everything up to the first 200 from /health/ready. Raises EllmError.

    In a cluster that stays, nothing is left half started.
    """
    check_room(config, progress)
    target = application.build(config)
    try:
        application.deploy(target)
        wait_for_application(config, progress)
    except BaseException:  # Stopped too
        if config.cluster.address is not None:
            take_down(config)
        raise


def check_room(config: EllmConfig, progress: Progress) -> None:
    """A cluster of our own has what it has; one that was joined may grow. One model that does not fit stops
    no other. Raises ConfigError."""
    lines = room.problems(config, room.nodes())
    if config.cluster.address is None and len(lines) >= len(config.served):
        raise ConfigError(lines[0], param="tp")
    for line in lines:
        progress.line(f"{line}; waiting for room")


def take_down(config: EllmConfig) -> None:
    application.delete(time.monotonic() + config.worker.drain_timeout_s + MARGIN_S)


def wait_for_application(config: EllmConfig, progress: Progress) -> None:
    deadline = time.monotonic() + config.cluster.start_timeout_s
    num_workers = 0
    several = len(config.served) > 1
    for model in config.served:
        count = model.num_workers
        of = f" of {model.name}" if several else ""
        with progress.phase(f"{count} worker{'s' if count > 1 else ''}{of} on {model.worker.model.device}"):
            num_workers += wait_for_model(config, model, progress, deadline)
    if not num_workers:
        raise DeployFailed("no model can be served")
    with progress.phase("Router"):
        application.wait_for("Router", deadline, alone=not several)
    with progress.phase("HTTP ingress"):
        wait_until_ready(config, progress, deadline)
        progress.note("ready")
    for line in workers.pool_lines(worker_table(config, num_workers)):
        progress.line(f"  {line}")


def wait_for_model(config: EllmConfig, model: ServedModel, progress: Progress, deadline: float) -> int:
    """How many workers of it are up: 0 where it cannot be served and others can. Raises DeployFailed."""
    several = len(config.served) > 1
    name = worker_deployment(config, model)
    try:
        application.wait_for(name, deadline, lambda: progress.note(workers.progress()), alone=not several)
    except DeployFailed as error:
        if not several:
            raise
        progress.note(f"cannot be served: {error.message}")
        return 0
    progress.note("ready")
    return model.num_workers


def needed_cpus(config: EllmConfig) -> float:
    """Logical CPUs that the deployments ask Ray for, with as many workers as there may be."""
    ranks = sum(model.max_workers * model.worker.tensor_parallel_size for model in config.served)
    return config.router.num_replicas * ROUTER_CPUS + ranks * config.cluster.worker_num_cpus


def wait_until_ready(config: EllmConfig, progress: Progress, deadline: float) -> None:
    """Until /health/ready is 200 through the ingress. Raises DeployFailed."""
    server = Server(base_url(config), timeout_s=2.0)
    reason = ""
    while time.monotonic() < deadline:
        try:
            server.probe("/health/ready")
            return
        except RequestFailed as error:
            reason = error.message
            progress.note(reason)
        time.sleep(0.05)
    raise DeployFailed(f"not ready after {config.cluster.start_timeout_s:.0f} s: {reason}")


def worker_table(config: EllmConfig, num_workers: int) -> list[dict[str, Any]]:
    """The workers as a router sees them; it is given a moment to find so many."""
    key = config.router.admin_key
    if key is None and (config.router.api_keys or config.router.api_key_file is not None):
        return []  # nobody may see it
    server = Server(base_url(config), key, timeout_s=5.0)
    deadline = time.monotonic() + FIND_S
    while True:
        try:
            table: list[dict[str, Any]] = server.get("/admin/workers")["workers"]
        except RequestFailed:
            table = []
        if len(table) >= num_workers or time.monotonic() > deadline:
            return table
        time.sleep(0.05)


def watch(interrupt: Interrupt, progress: Progress, parent: int, *, own: bool) -> bool:
    """Wait for the signal. True if the cluster was lost before it came: one of our `own` that says nothing is
    over. One that was joined may have lost its head alone: what runs there goes on, the head may come back,
    and how long that is waited for is Ray's to say."""
    shown = "RUNNING"
    answered = time.monotonic()
    told = False
    while not interrupt.asked.wait(WATCH_S) and os.getppid() == parent:
        status = application.status()
        if status is not None:
            answered = time.monotonic()
            told = False
            if status.state != shown:
                message = f": {status.message}" if status.message else ""
                progress.line(f"The application is {status.state}{message}")
                shown = status.state
        elif time.monotonic() - answered > LOST_S and not told:
            told = True
            if own:
                progress.line("Ray does not answer any more; ending")
                return True
            progress.line("Ray does not answer; requests are still served, and the head may come back")
    return False
