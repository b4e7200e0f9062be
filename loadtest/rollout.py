"""A Serve config, deployed by Ray's own command, changed under load, and a node emptied: nothing may be lost.

    python -m ellm.loadtest.rollout [FILE] [--streams 16] [--changes 2] [--model PATH]

A real Ray cluster of three nodes on this machine. `serve deploy` brings the file up; then, while streams run
without a pause between them, it is changed and deployed again, and at last `ellm drain --node` empties one of
the nodes. Every request must be answered in full. Workers and routers are kept to nodes of their own by
resources in their placement groups, as the chart does it.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ellm.loadtest.chaos_client import Answer, Template, ask, learn, make_templates
from ellm.loadtest.chaos_cluster import free_port, set_environment, wait_until
from ellm.loadtest.result import Result, Row, command_line

FILE = Path(__file__).parent.parent / "deploy" / "serve" / "ellm.yaml"
HOST = "127.0.0.1"
START_S = 900.0
ABOUT = """\
A Ray cluster of a head and two nodes on one machine; {file} deployed by `serve deploy`. {streams} streams of
{tokens} tokens or a few more at a time through HAProxy, the next one as soon as one ends, while the file is
changed (the workers' and the routers' settings, so that all of them are replaced) and deployed again, and
then one of the two nodes that hold workers and routers is emptied by `ellm drain --node`. A request fails if
its stream does not end in [DONE], or its text is not that of an undisturbed server. Pauses are between two
events of one stream."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=FILE, help="default: deploy/serve/ellm.yaml")
    parser.add_argument("--streams", type=int, default=16, help="open at a time")
    parser.add_argument("--tokens", type=int, default=64, help="of each")
    parser.add_argument("--changes", type=int, default=2, help="of the file, one after the other")
    parser.add_argument("--model", help="instead of the file's: a checkpoint, or simulated:...")
    parser.add_argument("--no-drain", action="store_true", help="empty no node")
    parser.add_argument("--name", default="rollout", help="slug of the result file; empty: none is written")
    return parser.parse_args(argv)


def adapted(config: dict[str, Any], port: int, model: str | None) -> dict[str, Any]:
    """For several nodes on one machine: one ingress, on the head, and each kind of actor on its own nodes."""
    config = copy.deepcopy(config)
    config |= {"proxy_location": "HeadOnly", "http_options": {"host": HOST, "port": port}}
    (application,) = config["applications"]
    args = application["args"]
    args |= {"host": HOST, "port": port}
    if model is not None:
        args["model"] = model
    application["deployments"] = [
        {"name": "Router", "placement_group_bundles": [{"CPU": 1, "ellm_router": 0.001}]},
        {"name": "Worker", "placement_group_bundles": [{"CPU": 0.5, "ellm_worker": 0.001}]},
    ]
    return config


def changed(config: dict[str, Any], generation: int) -> dict[str, Any]:
    """Another version, of workers and routers."""
    config = copy.deepcopy(config)
    args = config["applications"][0]["args"]
    args.setdefault("worker", {})["outbox_items"] = 256 + generation
    args.setdefault("router", {}).setdefault("limits", {})["max_stop"] = 16 + generation
    return config


class Load:
    """Streams, as many at a time as asked for, until it is over. Each is compared with an undisturbed one."""

    def __init__(self, port: int, templates: list[Template], num_streams: int) -> None:
        self.answers: list[Answer] = []
        self.over = threading.Event()
        self._port, self._templates, self._num_streams = port, templates, num_streams

    def run(self) -> None:
        asyncio.run(self._all())

    async def _all(self) -> None:
        await asyncio.gather(*(self._client(i) for i in range(self._num_streams)))

    async def _client(self, number: int) -> None:
        while not self.over.is_set():
            number = (number + 1) % len(self._templates)
            answer = await ask(HOST, self._port, number, self._templates[number])
            self.answers.append(answer)
            if answer.error:
                await asyncio.sleep(0.1)

    def failed(self, answers: list[Answer]) -> list[str]:
        """What was not answered in full, and as it should be."""
        return [
            answer.error or "another text"
            for answer in answers
            if not (answer.whole and self._templates[answer.template].fits(answer))
        ]


class RolloutCluster:
    """Made by `with`: a head with a dashboard, and two nodes that hold workers and routers."""

    def __init__(self, config: dict[str, Any], model: str | None) -> None:
        self.port, self._dashboard = free_port(), free_port()
        self.config = adapted(config, self.port, model)

    def __enter__(self) -> RolloutCluster:
        import ray
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": self._dashboard}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        resources = {"ellm_router": 1, "ellm_worker": 1}
        memory = 80 * 2**20
        self.nodes = [
            self._cluster.add_node(num_cpus=8, resources=resources, object_store_memory=memory)
            for _ in range(2)
        ]
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level="ERROR")
        return self

    def __exit__(self, *_: object) -> None:
        import ray
        from ray import serve

        try:
            serve.shutdown()
        finally:
            ray.shutdown()
            self._cluster.shutdown()

    def deploy(self, config: dict[str, Any]) -> None:
        """By Ray's command, which hands it over and leaves. Raises RuntimeError."""
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(config, file)
            file.flush()
            program = Path(sys.executable).with_name("serve")
            address = f"http://{HOST}:{self._dashboard}"
            done = subprocess.run(
                [program, "deploy", file.name, "-a", address], capture_output=True, text=True, timeout=300
            )
        if done.returncode:
            raise RuntimeError(f"serve deploy: {done.stdout[-2000:]}{done.stderr[-2000:]}")

    def drain_node(self) -> None:
        """The last one, by our command."""
        program = Path(sys.executable).with_name("ellm")
        node, address = self.nodes[-1].node_id, self._cluster.address
        words = ["drain", "--node", node, "--address", address, "--timeout", "300"]
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(f"ellm drain: {done.stdout[-2000:]}{done.stderr[-2000:]}")

    def actors(self) -> set[str]:
        """Serve's replicas that live, by name."""
        from ray._private import state

        names = {actor["Name"] for actor in state.actors(actor_state_name="ALIVE").values()}
        return {name for name in names if name.startswith("SERVE_REPLICA::")}

    def ready(self) -> bool:
        """Serve is done with what it was told, and the ingress answers."""
        from ray import serve

        found = serve.status().applications.get("ellm")
        if found is None or found.status != "RUNNING":
            return False
        if any(item.status != "HEALTHY" for item in found.deployments.values()):
            return False
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.port}/health/ready", timeout=2.0) as answer:
                return bool(json.load(answer)["status"] == "ready")
        except OSError:
            return False

    def model(self) -> str:
        with urllib.request.urlopen(f"http://{HOST}:{self.port}/v1/models", timeout=5.0) as answer:
            return str(json.load(answer)["data"][0]["id"])


def phase(what: str, load: Load, act: Callable[[], None]) -> Row:
    """`act` under load, and what became of the requests that ended meanwhile."""
    first, start = len(load.answers), time.monotonic()
    act()
    ended = load.answers[first:]
    row: Row = {
        "phase": what,
        "seconds": round(time.monotonic() - start, 1),
        "requests": len(ended),
        "failed": len(load.failed(ended)),
        "longest pause s": round(max((answer.longest_pause_s for answer in ended), default=0.0), 2),
        "slowest first token s": round(
            max((a.first_at - a.sent_at for a in ended if a.first_at), default=0.0), 2
        ),
    }
    print(json.dumps(row), flush=True)
    return row


def roll(cluster: RolloutCluster, generation: int) -> None:
    """Deploy another version, and wait until nothing of the old one is left."""
    old = cluster.actors()
    cluster.deploy(changed(cluster.config, generation))
    wait_until(lambda: not old & cluster.actors() and cluster.ready(), START_S)


def run(args: argparse.Namespace) -> tuple[list[Row], Load]:
    config = yaml.safe_load(args.file.read_text())
    with RolloutCluster(config, args.model) as cluster:
        start = time.monotonic()
        cluster.deploy(cluster.config)
        wait_until(cluster.ready, START_S)
        print(f"up after {time.monotonic() - start:.1f} s", flush=True)
        templates = make_templates(16, args.tokens, 0, cluster.model())
        asyncio.run(learn(HOST, cluster.port, templates, args.streams))
        load = Load(cluster.port, templates, args.streams)
        thread = threading.Thread(target=load.run)
        thread.start()
        try:
            rows = [phase("undisturbed", load, partial(time.sleep, 10.0))]
            for number in range(1, args.changes + 1):
                rows.append(phase(f"change {number}", load, partial(roll, cluster, number)))
            if not args.no_drain:
                rows.append(phase("node emptied", load, cluster.drain_node))
            rows.append(phase("afterwards", load, partial(time.sleep, 5.0)))
        finally:
            load.over.set()
            thread.join()
    return rows, load


def main() -> int:
    args = parse()
    set_environment()
    for name in ("READY", "HEALTH"):  # a busy machine is no reason to give up an ingress
        os.environ.setdefault(f"RAY_SERVE_PROXY_{name}_CHECK_TIMEOUT_S", "60")
    rows, load = run(args)
    failed = load.failed(load.answers)
    print(f"{len(load.answers)} requests, {len(failed)} failed {failed[:5]}")
    if args.name:
        result = Result(
            args.name,
            "Rolling a Serve config",
            ABOUT.format(file=args.file.name, streams=args.streams, tokens=args.tokens),
            command_line("ellm.loadtest.rollout"),
            rows,
            notes=[f"{len(load.answers)} requests in all, {len(failed)} failed."],
            raw={"failed": failed},
        )
        print(os.path.relpath(result.write()))
    return 1 if failed or not load.answers else 0


if __name__ == "__main__":
    sys.exit(main())
