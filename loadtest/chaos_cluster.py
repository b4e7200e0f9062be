"""The cluster that a chaos run disturbs: several raylets on this machine, Serve, routers and workers on them.

Worker ranks ask for a made-up GPU each, which only the worker nodes have: so routers, the controller and the
ingress stay on the head node, and workers can move. All processes it ever saw are remembered: whatever is
alive at the end has leaked.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
import urllib.request
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from typing import Any

import psutil

from ellm.router.config import RouterConfig
from ellm.router.ingress import ingress_environment
from ellm.worker.api.config import WorkerConfig

APP = "ellm"
MANY = ("RankActor", "FollowerActor", "ServeReplica")  # of the processes' names, those of workers and routers


@dataclass(frozen=True, slots=True)
class ChaosSetting:
    """What is started."""

    config: WorkerConfig
    num_nodes: int = 3
    num_single: int = 3  # workers of one rank
    num_pairs: int = 1  # workers of two ranks
    num_routers: int = 2
    tokenizer: str | None = None
    policy: str = RouterConfig().policy

    @property
    def num_workers(self) -> int:
        return self.num_single + self.num_pairs


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def set_environment() -> None:
    """Before Ray is imported. As `ellm serve` sets it: one HAProxy as the ingress."""
    limits = RouterConfig().limits
    values = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        **ingress_environment(limits.request_deadline_s, limits.receive_timeout_s),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
        **{
            f"RAY_SERVE_{name}_PORT": str(free_port())
            for name in ("FALLBACK_PROXY_HTTP", "FALLBACK_PROXY_GRPC", "HAPROXY_METRICS", "HAPROXY_STATS")
        },
    }
    os.environ.update(values)


class ChaosCluster:
    """Made by `with`; blocks. Its methods may be used from any thread."""

    def __init__(self, setting: ChaosSetting) -> None:
        self.setting = setting
        self.port = free_port()
        self.nodes: list[Any] = []
        self._seen: dict[int, tuple[float, str]] = {}  # pid -> (created, name)
        self._stop = threading.Event()
        self._generation = 0

    def __enter__(self) -> ChaosCluster:
        import ray
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 8, "num_gpus": 0, "include_dashboard": False},
        )
        try:
            for _ in range(self.setting.num_nodes):
                self.add_node()
            ray.init(address=self._cluster.address, log_to_driver=False, logging_level="ERROR")
            self.start_watch()
            start_serve(self.port)
            self.deploy()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        import ray
        from ray import serve

        with contextlib.suppress(Exception):
            serve.shutdown()
        self.stop_watch()
        ray.shutdown()
        self._cluster.shutdown()

    def node_args(self) -> dict[str, Any]:
        """Of a node for workers."""
        gpus = -(-(self.setting.num_single + 2 * self.setting.num_pairs) // self.setting.num_nodes) + 1
        return {"num_cpus": 0, "num_gpus": gpus, "object_store_memory": 80 * 2**20}

    def add_node(self) -> None:
        self.nodes.append(self._cluster.add_node(**self.node_args()))

    def start_watch(self) -> None:
        """From now on every process that is started is remembered."""
        threading.Thread(target=self._watch, daemon=True).start()

    def stop_watch(self) -> None:
        self._stop.set()

    def kill_node(self, node: Any) -> None:
        """SIGKILL of its raylet, as when a machine dies; what it had started is left to itself."""
        os.kill(raylet_pid(node), signal.SIGKILL)
        self.nodes.remove(node)

    def clear_node(self, node: Any) -> None:
        """After `kill_node`: the few helpers of the raylet that Ray leaves."""
        with contextlib.suppress(AssertionError):
            self._cluster.remove_node(node, allow_graceful=False)

    def deploy(self, *, wait: bool = True) -> None:
        """Each call is a new version of the same application: a rolling update."""
        self._generation += 1
        deploy(self.setting, self._generation, wait=wait)

    # What is seen of it.

    def rows(self) -> list[dict[str, Any]]:
        """The workers as a router sees them; [] where none answers."""
        return rows_at(f"127.0.0.1:{self.port}") or []

    def ready_rows(self) -> list[dict[str, Any]]:
        return [row for row in self.rows() if row["state"] == "ready"]

    def pids(self, name: str) -> list[int]:
        """Of living processes whose title holds `name`."""
        return [pid for pid, (_, title) in list(self._seen.items()) if name in title and self._lives(pid)]

    def streams_of(self, router: int) -> int | None:
        """Sequences in the router with this pid, asked past the ingress; None if it says nothing."""
        address = self.address_of(router)
        rows = None if address is None else rows_at(address, timeout_s=1.0)
        return None if rows is None else sum(int(row["num_here"]) for row in rows)

    def address_of(self, router: int) -> str | None:
        """Where the router with this pid answers by itself; None if nowhere."""
        for line in psutil.Process(router).net_connections("tcp"):
            if line.status == psutil.CONN_LISTEN:
                host = "127.0.0.1" if line.laddr.ip in ("0.0.0.0", "::") else line.laddr.ip
                if rows_at(f"{host}:{line.laddr.port}", timeout_s=1.0) is not None:
                    return f"{host}:{line.laddr.port}"
        return None

    def leaked_ranks(self) -> list[int]:
        """Rank processes that belong to no worker that routers see."""
        known = {pid for row in self.rows() for pid in row["rank_pids"]}
        return [pid for pid in self.pids("RankActor") + self.pids("FollowerActor") if pid not in known]

    def left_behind(self) -> list[tuple[int, str]]:
        """Processes of the cluster that are still alive; to be asked after the end."""
        return [(pid, title) for pid, (_, title) in self._seen.items() if self._lives(pid)]

    def node_of(self, pid: int) -> Any:
        """The node whose raylet started this process."""
        with contextlib.suppress(psutil.NoSuchProcess):
            ancestors = {parent.pid for parent in psutil.Process(pid).parents()}
            for node in self.nodes:
                if raylet_pid(node) in ancestors:
                    return node
        return None

    def processes_of(self, node: Any) -> list[int]:
        """The raylet and all that it started."""
        raylet = psutil.Process(raylet_pid(node))
        return [raylet.pid, *(child.pid for child in raylet.children(recursive=True))]

    def _lives(self, pid: int) -> bool:
        try:
            process = psutil.Process(pid)
            created = process.create_time()
            return created == self._seen[pid][0] and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, KeyError):
            return False

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    title = " ".join(process.cmdline()[:1]) or process.name()
                    self._seen[process.pid] = (process.create_time(), title)


def start_serve(port: int) -> None:
    """With the ingress on the head node."""
    from ray import serve

    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})


def deploy(setting: ChaosSetting, generation: int, *, wait: bool = True) -> None:
    """The application, from a process that has joined the cluster."""
    from ray import serve

    target = serve.RunTarget(_application(setting, generation), name=APP, route_prefix="/")
    serve.run_many([target], wait_for_ingress_deployment_creation=wait, wait_for_applications_running=wait)


def _application(setting: ChaosSetting, generation: int) -> Any:
    from ellm.cluster.actor import find_or_start
    from ellm.cluster.api.config import ControllerConfig, ModelScale
    from ellm.router.deployment import router_application
    from ellm.router.replicas import RayDirectory
    from ellm.worker.api.config import served_name
    from ellm.worker.supervisor import worker_application

    # A field that changes nothing, and makes it another version.
    config = replace(setting.config, outbox_items=setting.config.outbox_items + generation)
    apps = []
    if setting.num_single:
        apps.append(worker_application(config, num_workers=setting.num_single, rank_cpus=0, rank_gpus=1))
    if setting.num_pairs:
        pair = replace(config, tensor_parallel_size=2)
        made = worker_application(
            pair, num_workers=setting.num_pairs, rank_cpus=0, rank_gpus=1, name="WorkerPair"
        )
        apps.append(made)
    scale = ModelScale(served_name(config.model), setting.num_workers, setting.num_workers)
    return router_application(
        RouterConfig(num_replicas=setting.num_routers, tokenizer=setting.tokenizer, policy=setting.policy),
        [config.model],
        apps,
        partial(find_or_start, RayDirectory, ControllerConfig(), (scale,)),
    )


def rows_at(address: str, timeout_s: float = 3.0) -> list[dict[str, Any]] | None:
    """The workers as the router at this address sees them; None where none answers."""
    try:
        with urllib.request.urlopen(f"http://{address}/admin/workers", timeout=timeout_s) as answer:
            found: list[dict[str, Any]] = json.load(answer)["workers"]
            return found
    except (OSError, ValueError, HTTPException):
        return None


def raylet_pid(node: Any) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def wait_until(condition: Any, timeout_s: float, period_s: float = 0.1) -> float:
    """Seconds it took. Raises TimeoutError."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > timeout_s:
            raise TimeoutError(f"waited {timeout_s:.0f} s in vain")
        time.sleep(period_s)
    return time.monotonic() - start
