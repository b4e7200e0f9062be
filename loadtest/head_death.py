"""The head node dies while clients read: first Ray's control store (GCS) alone, then the whole node.

    python -m ellm.loadtest.head_death [--model PATH] [--down-s 15]

A real Ray cluster of a head and worker nodes on this machine, its control store kept in Redis; workers under
STRICT, routers on the worker nodes. Requests come by the clock and are never repeated: some by the ingress on
the head node, some straight to each router, as behind a load balancer. While the store is down a worker is
killed too; after the head has come back another one is, to see that Serve looks after them again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any

from ellm.loadtest import chaos, chaos_cluster, head_cluster
from ellm.loadtest.chaos_client import OpenLoop, Template, learn, make_templates
from ellm.loadtest.chaos_cluster import ChaosSetting, free_port, wait_until
from ellm.loadtest.chaos_faults import RECOVERY_S, decoding
from ellm.loadtest.head_cluster import HeadCluster
from ellm.loadtest.result import Result, Row, command_line
from ellm.worker.api.config import served_name

RECONNECT_S = 600  # as on Kubernetes, where a node needs its time to come back
VICTIM_S = 60.0
INGRESS = "the ingress on the head"
BROKEN = ("connection", "500", "503", "502")  # what clients of an ingress that is gone see


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(chaos.TOKENIZER), help="a checkpoint, or simulated:...")
    parser.add_argument("--streams", type=int, default=32, help="that are open at a time, about")
    parser.add_argument("--tokens", type=int, default=128, help="output tokens of a request, at least")
    parser.add_argument("--step-ms", type=float, default=60.0)
    parser.add_argument(
        "--down-s", type=float, default=15.0, help="for so long the store, then the head, is away"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="head-death", help="of the result file; empty: none is written")
    for name in ("--drive", "--address", "--port"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def setting(args: argparse.Namespace) -> ChaosSetting:
    """Two workers on two nodes, and two routers."""
    extra = ["--nodes", "2", "--workers", "2", "--pairs", "0", "--routers", "2", "--model", args.model]
    return chaos.setting(chaos.parse([*extra, "--step-ms", str(args.step_ms)]))


# The driver: it joins, and goes again.


def drive(args: argparse.Namespace) -> None:
    import ray

    ray.init(address=args.address, log_to_driver=False, logging_level="ERROR")
    if args.drive == "start":
        chaos_cluster.start_serve(int(args.port))
        chaos_cluster.deploy(setting(args), 1)
    elif args.drive == "describe":
        from ellm.cluster.actor import NAME
        from ellm.worker.api.actor_name import NAMESPACE

        print(json.dumps(ray.get(ray.get_actor(NAME, NAMESPACE).describe.remote(), timeout=30.0)))
    else:
        ray.serve.shutdown()


# The run.


class Load:
    """One open loop for each way in, in a thread of their own."""

    def __init__(self, ways: dict[str, str], templates: list[Template], rate: float, seed: int) -> None:
        self.loops: dict[str, OpenLoop] = {}
        for place, (name, address) in enumerate(ways.items()):
            host, port = address.rsplit(":", 1)
            self.loops[name] = OpenLoop(host, int(port), templates, rate / len(ways), seed + place)
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    async def _run(self) -> None:
        await asyncio.gather(*(loop.run(self._over.is_set) for loop in self.loops.values()))


class Story:
    """What happens, one after the other."""

    def __init__(self, cluster: HeadCluster, args: argparse.Namespace) -> None:
        self._cluster, self._down_s = cluster, args.down_s
        self.events: list[dict[str, Any]] = []

    def tell(self) -> None:
        self._wait_for_streams()
        self._note("control store killed", self._cluster.kill_control_store)
        begun = time.monotonic()
        self._note("worker killed, the store away", self._kill_rank)
        time.sleep(max(0.0, begun + self._down_s - time.monotonic()))
        self._note("control store back; whole", self._store_back)
        self._wait_for_streams()
        before = self._epochs()
        self._note("head killed", self._cluster.kill_head)
        time.sleep(self._down_s)
        assert self._epochs() == before, "a worker went with the head"
        self._note("head back; its ingress answers", self._head_back)
        self.events[-1]["workers went on"] = self._epochs() == before
        self._wait_for_streams()
        self._note("worker killed; replaced", self._kill_and_replace)

    def whole(self) -> bool:
        return len(self._cluster.ready_rows()) == self._cluster.setting.num_workers

    def _note(self, what: str, act: Any) -> None:
        at = time.monotonic()
        act()
        self.events.append({"event": what, "at": at, "took s": round(time.monotonic() - at, 2)})
        print(f"{what}: {self.events[-1]['took s']} s", flush=True)

    def _epochs(self) -> set[str]:
        return {row["epoch"] for row in self._cluster.ready_rows()}

    def _wait_for_streams(self) -> None:
        wait_until(lambda: self.whole() and all(decoding(r) >= 2 for r in self._cluster.rows()), VICTIM_S)

    def _kill_rank(self) -> None:
        victim = max(self._cluster.ready_rows(), key=decoding)
        os.kill(victim["rank_pids"][0], signal.SIGKILL)
        wait_until(lambda: victim["epoch"] not in self._epochs(), RECOVERY_S, 0.02)

    def _kill_and_replace(self) -> None:
        self._kill_rank()
        wait_until(self.whole, RECOVERY_S)

    def _store_back(self) -> None:
        self._cluster.start_control_store()
        wait_until(self.whole, RECOVERY_S)

    def _head_back(self) -> None:
        self._cluster.start_head()
        wait_until(self._cluster.ingress_answers, RECOVERY_S)


def verdict_of(load: Load, story: Story, templates: list[Template]) -> dict[str, Any]:
    """Per way in: what failed before the head died, while it was away, and after."""
    killed, back = (_event(story, name) for name in ("head killed", "head back; its ingress answers"))
    until = back["at"] + back["took s"]
    rows: list[Row] = []
    for name, loop in load.loops.items():
        failed = [a for a in loop.answers if a.error]
        excused = [a for a in failed if name == INGRESS and killed["at"] <= a.ended_at and a.sent_at <= until]
        rows.append(
            {
                "way in": name,
                "requests": len(loop.answers),
                "lost": len(failed) - len(excused),
                "broken or refused with the ingress": len(excused),
                "corrupted": sum(not templates[a.template].fits(a) for a in loop.answers),
                "longest pause s": max((a.longest_pause_s for a in loop.answers), default=0.0),
                "errors": sorted({a.error for a in failed if a not in excused}),
            }
        )
    return {"rows": rows, "events": story.events}


def _event(story: Story, name: str) -> dict[str, Any]:
    return next(event for event in story.events if event["event"] == name)


def passed(verdict: dict[str, Any]) -> bool:
    clean = not any(row["lost"] or row["corrupted"] for row in verdict["rows"])
    return clean and verdict["workers went on"] and not verdict["leaked processes"]


def run(args: argparse.Namespace) -> dict[str, Any]:
    redis_port = free_port()
    chaos_cluster.set_environment()
    head_cluster.set_environment(redis_port, RECONNECT_S)
    driver = [sys.executable, "-m", "ellm.loadtest.head_death", "--model", args.model]
    made = setting(args)
    with HeadCluster(made, redis_port, [*driver, "--step-ms", str(args.step_ms)]) as cluster:
        templates = make_templates(16, args.tokens, args.seed, served_name(made.config.model))
        asyncio.run(learn("127.0.0.1", cluster.port, templates, 8))
        ways = {INGRESS: f"127.0.0.1:{cluster.port}"}
        ways |= {f"router {i}": address for i, address in enumerate(cluster.find_routers())}
        rate = args.streams / (1.2 * args.tokens * args.step_ms / 1000)
        story = Story(cluster, args)
        with Load(ways, templates, rate, args.seed) as load:
            story.tell()
        verdict = verdict_of(load, story, templates)
        verdict["workers went on"] = _event(story, "head back; its ingress answers")["workers went on"]
        verdict["controller"] = json.loads(cluster.drive("describe"))
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not cluster.left_behind(), 20)
    return verdict | {"leaked processes": [list(found) for found in cluster.left_behind()]}


def main() -> int:
    args = parse()
    if args.drive:
        drive(args)
        return 0
    verdict = run(args)
    print(json.dumps(verdict, indent=1))
    if args.name:
        result = Result(
            name=args.name,
            title="The head node dies",
            about=" ".join(__doc__.split("\n\n")[2].split()),
            command=command_line("ellm.loadtest.head_death"),
            rows=[{key: value for key, value in row.items() if key != "errors"} for row in verdict["rows"]],
            seed=args.seed,
            notes=[f"{event['event']}: {event['took s']:.1f} s." for event in verdict["events"]],
            raw=verdict,
        )
        print(f"wrote {result.write()}")
    return 0 if passed(verdict) else 1


if __name__ == "__main__":
    sys.exit(main())
