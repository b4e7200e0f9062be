"""`ellm drain`: empty one worker, or a whole node, without losing a request."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from ellm.worker.api.actor_name import NAMESPACE, epoch_of, worker_id_of
from ellm.worker.api.errors import ConfigError, EllmError

POLL_S = 0.5
EPILOG = """
From the first moment the worker takes nothing new. Requests that wait or are parked go to other workers at
once, as token ids; those that run have the time given to end, then they go on elsewhere, too. Clients notice
a pause at most.

Then the worker is replaced: Ray Serve starts a new one in its place, which loads the model anew (for a new
machine, take the old one out of the cluster first). With --keep it stays up and empty, and "draining" in
`ellm status`, until `ellm drain` without --keep replaces it. If no other worker is up, requests wait in the
routers for the replacement.

With --node all that serves on a node is started elsewhere first, where there is room, and then drained;
nothing new comes to the node. It waits until the node serves nothing, or the time is up. Kubernetes runs it
before a pod goes.
"""


class NoSuchWorker(EllmError):
    """No worker of that name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("worker", metavar="WORKER", nargs="?", help="its id, as in `ellm status`: w0")
    parser.add_argument("--node", metavar="ID", help="a node of Ray instead of a worker; here: this one")
    parser.add_argument("--model", help="the served name, where several models have a worker of that id")
    parser.add_argument(
        "--address", default="auto", help="of the Ray cluster (default: the one on this machine)"
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for requests that run to end there"
                        " (default: worker.drain_timeout_s)")  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="leave the worker up and empty")


def run(args: argparse.Namespace) -> int:
    if args.timeout is not None and not 0.0 <= args.timeout <= 86_400.0:
        raise EllmError("--timeout must be in [0, 86400]")
    if (args.worker is None) == (args.node is None):
        raise ConfigError("name a worker, or a node with --node")
    import ray

    try:
        ray.init(address=args.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise EllmError(f"Ray: {' '.join(str(error).split())[:300]}") from None
    try:
        if args.node is not None:
            from ellm.deploy import node_drain

            return node_drain.drain(args.node, args.timeout)
        return drain(args.worker, args.model, args.timeout, keep=args.keep)
    finally:
        ray.shutdown()


def drain(worker_id: str, model: str | None, timeout_s: float | None, *, keep: bool) -> int:
    """On the cluster this process has joined. Raises NoSuchWorker."""
    import ray
    from ray.exceptions import RayError

    rank = _find(worker_id, model)
    done = rank.drain.remote(timeout_s, keep=keep)
    shown = None
    while not ray.wait([done], timeout=POLL_S)[0]:
        left = _num_live(rank)
        if left is not None and left != shown:
            print(f"{worker_id}: {left} request{'' if left == 1 else 's'} left", file=sys.stderr, flush=True)
            shown = left
    try:
        whole = ray.get(done)
    except RayError:
        print(f"{worker_id} has ended before it was empty; its requests go on elsewhere", file=sys.stderr)
        return 1
    how = "all requests ended there or were handed over" if whole else "time was up; the rest was handed over"
    after = "it stays up and takes nothing" if keep else "it is being replaced"
    print(f"{worker_id} is drained ({how}); {after}")
    return 0


def _find(worker_id: str, model: str | None) -> Any:
    from ray.util import list_named_actors

    names = [a["name"] for a in list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]
    workers = [name for name in names if epoch_of(name, model) is not None]
    found = [name for name in workers if worker_id_of(name) == worker_id]
    if not found:
        there = ", ".join(sorted({str(worker_id_of(name)) for name in workers})) or "none"
        raise NoSuchWorker(f"there is no worker {worker_id!r}; there are: {there}")
    alive = [handle for handle in (_handle(name) for name in found) if handle is not None]
    if len(alive) > 1:
        raise NoSuchWorker(f"{len(alive)} workers have the id {worker_id!r}: say which by --model")
    if not alive:
        raise NoSuchWorker(f"worker {worker_id!r} is loading or going; try again")
    return alive[0]


def _handle(name: str) -> Any:
    """The rank 0 that serves under this name; None while it loads, and when it has gone."""
    import ray
    from ray.exceptions import RayError

    try:
        handle = ray.get_actor(name, NAMESPACE)
        status = ray.get(handle.status.remote(), timeout=5.0)
    except (ValueError, RayError):
        return None
    return handle if status.state in ("ready", "draining") and not status.drained else None


def _num_live(rank: Any) -> int | None:
    import ray
    from ray.exceptions import RayError

    try:
        return int(ray.get(rank.status.remote(), timeout=POLL_S).num_live)
    except RayError:
        time.sleep(POLL_S)
        return None
