"""A cluster whose head node can die: its control store (GCS) keeps its tables in Redis.

As `chaos_cluster`, with routers on the worker nodes and nothing but Ray's and Serve's own processes on the
head. This process joins no cluster, for a driver ends with its raylet: the application is deployed by one
that comes and goes. Needs `redis-server`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

import psutil

from ellm.loadtest.chaos_cluster import (
    APP,
    ChaosCluster,
    ChaosSetting,
    free_port,
    raylet_pid,
    rows_at,
    wait_until,
)

ROUTER = f"ServeReplica:{APP}:Router"
START_S = 120.0


def set_environment(redis_port: int, reconnect_s: int) -> None:
    """Before Ray is imported, after `chaos_cluster.set_environment`. `reconnect_s`: for so long Ray's
    processes look for a control store that is gone, before they end themselves."""
    os.environ |= {
        "RAY_REDIS_ADDRESS": f"127.0.0.1:{redis_port}",
        "RAY_external_storage_namespace": "ellm",
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(reconnect_s),
    }


class HeadCluster(ChaosCluster):
    """Made by `with`, after `set_environment` of both modules; blocks."""

    def __init__(self, setting: ChaosSetting, redis_port: int, driver: Sequence[str]) -> None:
        """`driver`: a command that joins the cluster; it is given what to do, the address and the port."""
        super().__init__(setting)
        self._driver = driver
        self._redis_port = redis_port
        self._head_args = {
            "num_cpus": 0,
            "num_gpus": 0,
            "include_dashboard": False,
            "gcs_server_port": free_port(),
            "object_store_memory": 80 * 2**20,
        }
        self._routers: list[str] = []  # where they listen

    def __enter__(self) -> HeadCluster:
        from ray.cluster_utils import Cluster

        line = ["redis-server", "--port", str(self._redis_port), "--bind", "127.0.0.1", "--save", ""]
        self._redis = subprocess.Popen(line, stdout=subprocess.DEVNULL)
        try:
            self._cluster = Cluster(initialize_head=True, head_node_args=self._head_args)
            for _ in range(self.setting.num_nodes):
                self.add_node()
            self.start_watch()
            self.drive("start")
            wait_until(self.find_routers, START_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self.drive("shutdown")
        self.stop_watch()
        with contextlib.suppress(Exception):
            self._cluster.shutdown()
        self._redis.kill()
        self._redis.wait()

    def node_args(self) -> dict[str, Any]:
        return {**super().node_args(), "num_cpus": 4}

    def drive(self, task: str) -> str:
        """Join, do it, leave; what was printed. Raises CalledProcessError."""
        line = [*self._driver, "--drive", task, "--address", self._cluster.address, "--port", str(self.port)]
        return subprocess.run(line, check=True, timeout=300, stdout=subprocess.PIPE, text=True).stdout

    # What is seen of it, past the ingress: that lives on the head.

    def find_routers(self) -> list[str]:
        """The addresses at which routers answer."""
        self._routers = [a for pid in self.pids(ROUTER) if (a := self.address_of(pid)) is not None]
        return self._routers

    def rows(self) -> list[dict[str, Any]]:
        for address in self._routers:
            if rows := rows_at(address):
                return rows
        return []

    def ingress_answers(self) -> bool:
        return bool(rows_at(f"127.0.0.1:{self.port}"))

    # What happens to it.

    def kill_control_store(self) -> None:
        pid = self._processes("gcs_server")[0].pid
        os.kill(pid, signal.SIGKILL)
        psutil.Process(pid).wait(10)

    def start_control_store(self) -> None:
        """As whatever watches over it would: the same program at the same address."""
        head = self._cluster.head_node
        head.all_processes.pop("gcs_server")
        head._gcs_address = head._gcs_client = None
        head.start_gcs_server()

    def kill_head(self) -> int:
        """SIGKILL of everything on the head node, at once; how many there were."""
        head = self._cluster.head_node
        mine = {raylet_pid(head), *(child.pid for child in psutil.Process(raylet_pid(head)).children(True))}
        for infos in head.all_processes.values():
            mine |= {info.process.pid for info in infos}
        for pid in mine:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(mine)

    def start_head(self) -> None:
        """Another head at the same address."""
        self._cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        self._cluster.head_node = None
        self._cluster.add_node(**self._head_args)

    def _processes(self, kind: str) -> list[psutil.Process]:
        return [psutil.Process(info.process.pid) for info in self._cluster.head_node.all_processes[kind]]
