"""Empties a node before it goes: Ray is told, Serve moves what serves there, and this waits until it is gone.

Serve starts each replica anew elsewhere before it takes the old one away, and takes it away in time where
there is no room elsewhere; workers and routers drain themselves on their way out. Knows nothing of what runs
in them.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module
from typing import Any

from ellm.worker.api.errors import EllmError

HERE = "here"
POLL_S = 0.5
DEFAULT_S = 90.0
REPLICA = "SERVE_REPLICA::"  # how Serve names a replica's actor


class NoSuchNode(EllmError):
    """No node of that id."""


def drain(node: str, timeout_s: float | None) -> int:
    """On the cluster this process has joined. Returns 0 when nothing serves there any more, 1 when the time
    is up before. Raises EllmError."""
    import ray
    from ray.exceptions import RayError

    node_id = ray.get_runtime_context().get_node_id() if node == HERE else node
    if node_id not in {item["NodeID"] for item in ray.nodes() if item["Alive"]}:
        raise NoSuchNode(f"there is no node {node!r}; see `ray list nodes`")
    timeout = DEFAULT_S if timeout_s is None else timeout_s
    deadline = time.monotonic() + timeout
    try:
        _tell(node_id, timeout)
        left = replicas(node_id)
        while left and time.monotonic() < deadline:
            time.sleep(POLL_S)
            now = replicas(node_id)
            if now != left:
                print(f"{len(now)} replicas left", file=sys.stderr, flush=True)
            left = now
    except RayError as error:
        raise EllmError(f"Ray: {error}") from None
    if left:
        print(f"time is up: {len(left)} replicas are still there", file=sys.stderr)
        return 1
    print("nothing serves here any more")
    return 0


def _tell(node_id: str, timeout_s: float) -> None:
    """What `ray drain-node` does. Raises EllmError where Ray refuses."""
    import ray
    from ray.core.generated import autoscaler_pb2

    raylet: Any = import_module("ray._raylet")  # compiled, and untyped
    client = raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, reason = client.drain_node(
        node_id,
        autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION,
        "ellm drain",
        time.time_ns() // 1_000_000 + int(timeout_s * 1000),
    )
    if not accepted:
        raise EllmError(f"Ray does not drain this node: {reason}")


def replicas(node_id: str) -> frozenset[str]:
    """Serve's replicas on the node, by the names of their actors."""
    from ray._private import state

    found: dict[str, Any] = state.actors(actor_state_name="ALIVE")
    return frozenset(
        actor["Name"]
        for actor in found.values()
        if actor["Name"].startswith(REPLICA) and actor["Address"]["NodeID"] == node_id
    )
