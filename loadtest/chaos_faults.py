"""The faults of a chaos run. Each is applied to a worker with enough streams past their first token, and over
when the cluster is whole again; blocks, and runs in a thread of its own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from ellm.loadtest.chaos_cluster import ChaosCluster, wait_until

VICTIM_S = 60.0  # so long a worker with enough streams is waited for
RECOVERY_S = 120.0
STOPPED_S = 8.0  # of what is frozen for a while, at least


@dataclass(slots=True)
class Fault:
    """One fault as it went. Times are of `time.monotonic`."""

    kind: str
    at: float = 0.0
    victim: str = ""  # the worker's epoch, or what else was hit
    streams: int = 0  # of the victim (or of all workers), past their first token
    recovered_s: float | None = None  # until all workers, routers and the controller are there; None: never
    remarks: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Faults:
    """`apply` runs one of `kinds`."""

    def __init__(self, cluster: ChaosCluster, min_streams: int) -> None:
        self._cluster = cluster
        self._min_streams = min_streams
        self.kinds: dict[str, Callable[[Fault, dict[str, Any]], None]] = {
            "kill_rank": self._kill_rank,
            "kill_follower": self._kill_follower,
            "kill_supervisor": self._kill_supervisor,
            "kill_router": self._kill_router,
            "kill_controller": self._kill_controller,
            "kill_raylet": self._kill_raylet,
            "stop_rank": self._stop_rank,
            "silent_node": self._silent_node,
            "drain": self._drain,
            "rolling_update": self._rolling_update,
        }

    def apply(self, kind: str) -> Fault:
        """Raises TimeoutError when no worker gets enough streams."""
        fault = Fault(kind)
        victim = self._victim(pair=kind == "kill_follower")
        fault.victim, fault.streams = victim["epoch"], decoding(victim)
        fault.at = time.monotonic()
        self.kinds[kind](fault, victim)
        try:
            wait_until(self.whole, RECOVERY_S)
            fault.recovered_s = time.monotonic() - fault.at
        except TimeoutError:
            fault.remarks.append(f"not whole again: {self.state()}")
        return fault

    def whole(self) -> bool:
        """As many workers ready as there should be, and no other rank process."""
        cluster = self._cluster
        return (
            len(cluster.ready_rows()) == cluster.setting.num_workers
            and len(cluster.pids("ServeReplica:ellm:Router")) >= cluster.setting.num_routers
            and not cluster.leaked_ranks()
        )

    def state(self) -> str:
        rows = [f"{row['id']}:{row['state']}" for row in self._cluster.rows()]
        return f"{rows}, other ranks {self._cluster.leaked_ranks()}"

    def _victim(self, *, pair: bool) -> dict[str, Any]:
        """The worker with most streams past their first token, once that is enough."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            rows = self._cluster.ready_rows()
            rows = [row for row in rows if not pair or len(row["rank_pids"]) > 1]
            found[:] = sorted(rows, key=decoding)[-1:]
            return bool(found) and decoding(found[0]) >= self._min_streams and self.whole()

        wait_until(look, VICTIM_S)
        return found[0]

    def _gone(self, epoch: str) -> None:
        """Until routers have lost this incarnation."""
        wait_until(lambda: epoch not in {r["epoch"] for r in self._cluster.ready_rows()}, RECOVERY_S, 0.02)

    # The faults.

    def _kill_rank(self, fault: Fault, victim: dict[str, Any]) -> None:
        os.kill(victim["rank_pids"][0], signal.SIGKILL)
        self._gone(victim["epoch"])

    def _kill_follower(self, fault: Fault, victim: dict[str, Any]) -> None:
        os.kill(victim["rank_pids"][1], signal.SIGKILL)
        self._gone(victim["epoch"])

    def _kill_supervisor(self, fault: Fault, victim: dict[str, Any]) -> None:
        pid = rank_of(victim)[1].supervisor_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        self._gone(victim["epoch"])

    def _kill_router(self, fault: Fault, victim: dict[str, Any]) -> None:
        routers = self._cluster.pids("ServeReplica:ellm:Router")
        streams = self._cluster.streams_of(routers[0])
        if streams is None:
            fault.remarks.append("it does not say how many streams it has: none is excused")
        fault.victim, fault.streams, fault.at = f"router {routers[0]}", streams or 0, time.monotonic()
        os.kill(routers[0], signal.SIGKILL)
        wait_until(lambda: routers[0] not in self._cluster.pids("ServeReplica:ellm:Router"), RECOVERY_S)

    def _kill_controller(self, fault: Fault, victim: dict[str, Any]) -> None:
        import ray

        from ellm.cluster.actor import NAME
        from ellm.worker.api.actor_name import NAMESPACE

        def pid() -> int:
            try:
                handle = ray.get_actor(NAME, NAMESPACE)
                return int(ray.get(handle.describe.remote(), timeout=5.0)["pid"])
            except (ValueError, ray.exceptions.RayError):
                return 0

        wait_until(pid, RECOVERY_S)
        former = pid()
        fault.victim = f"controller {former}"
        os.kill(former, signal.SIGKILL)
        wait_until(lambda: pid() not in (0, former), RECOVERY_S)

    def _kill_raylet(self, fault: Fault, victim: dict[str, Any]) -> None:
        cluster = self._cluster
        node = cluster.node_of(victim["rank_pids"][0])
        assert node is not None
        fault.remarks.append(f"{len(cluster.processes_of(node))} processes on the node")
        cluster.kill_node(node)
        self._gone(victim["epoch"])
        cluster.clear_node(node)
        cluster.add_node()

    def _stop_rank(self, fault: Fault, victim: dict[str, Any]) -> None:
        pid = victim["rank_pids"][-1]
        os.kill(pid, signal.SIGSTOP)
        self._gone(victim["epoch"])

    def _silent_node(self, fault: Fault, victim: dict[str, Any]) -> None:
        node = self._cluster.node_of(victim["rank_pids"][0])
        assert node is not None
        frozen = self._cluster.processes_of(node)
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        try:
            self._gone(victim["epoch"])  # it must have been missed before it comes back
            time.sleep(max(0.0, fault.at + STOPPED_S - time.monotonic()))
        finally:
            for pid in frozen:
                try:
                    os.kill(pid, signal.SIGCONT)
                except ProcessLookupError:
                    fault.remarks.append(f"process {pid} ended while it was frozen")
        frozen_s = time.monotonic() - fault.at
        fault.remarks.append(f"{len(frozen)} processes frozen for {frozen_s:.1f} s")

    def _drain(self, fault: Fault, victim: dict[str, Any]) -> None:
        import ray

        handle, _ = rank_of(victim)
        done = ray.get(handle.drain.remote(1.0))
        fault.remarks.append("all ended there" if done else "the rest was handed back")
        self._gone(victim["epoch"])

    def _rolling_update(self, fault: Fault, victim: dict[str, Any]) -> None:
        former = {row["epoch"] for row in self._cluster.rows()}
        fault.victim = "all"
        self._cluster.deploy(wait=False)
        wait_until(lambda: not former & {row["epoch"] for row in self._cluster.rows()}, 2 * RECOVERY_S)


def decoding(row: dict[str, Any]) -> int:
    """Running sequences that are past their first token, at least: each other one has a row of its prompt
    still to run."""
    return max(0, int(row["num_running"]) - int(row["prefill_tokens"]))


def rank_of(row: dict[str, Any]) -> tuple[Any, Any]:
    """(the actor of rank 0, its status)."""
    import ray

    from ellm.worker.api.actor_name import NAMESPACE, actor_name

    handle = ray.get_actor(actor_name(row["model"], row["id"], row["epoch"]), NAMESPACE)
    return handle, ray.get(handle.status.remote(), timeout=10.0)
