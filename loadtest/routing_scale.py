"""What a routing decision costs on a very large cluster: the policies alone, no engine and no network.

    python -m ellm.loadtest.routing_scale --workers 1000 --routers 100 --rate 10000 --seconds 5

Workers are arithmetic: prompts are worked off at a rate, sequences last a while, memory is what they hold.
Each router sees its own subset of the workers, through reports that are packed and unpacked as on the wire
and come 100 ms late. Decisions are timed one by one in CPU time, a prompt's hashes and the update of the view
included in the one or the other. One process stands for all routers.
"""

from __future__ import annotations

import argparse
import gc
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import product
from random import Random
from time import thread_time

import msgpack
import numpy as np

from ellm.loadtest.result import Result, Row
from ellm.router.policies import POLICIES, Replica, RoutedRequest, make_policy
from ellm.router.subset import subset
from ellm.worker.api import wire
from ellm.worker.api.block_hash import block_hashes
from ellm.worker.api.report import WorkerReport
from ellm.worker.cache.digest_maker import DigestMaker

TICK_S = 0.01
REPORT_TICKS = 10  # between two reports of a worker
DELAY_TICKS = 10  # until a router has one
BLOCK, NUM_BLOCKS = 16, 4096
NUM_STEMS, SHARING = 2000, 0.5  # prefixes in common, and the share of prompts with one
OUTPUT_TOKENS, TOKEN_S = 128, 0.02
NUM_TOKENS = 1_000_000  # drawn once; prompts are stretches of them
ROWS_PER_S = 10_000.0
AIM_US = 100.0  # of a decision, in the mean


@dataclass(frozen=True, slots=True)
class Shape:
    """Of prompts."""

    stem: int  # tokens of a prefix in common
    tail: int  # tokens of a prompt's own
    rate: float  # of the requests per second: as many tokens as the workers can take


SHAPES = (Shape(256, 400, 1.0), Shape(4096, 4096, 0.08))  # of a chat; of Mooncake's conversations
NOTES = [
    "Every decision stands between other work here (reports, prompts, hashes), so it runs with cold caches, "
    "as in a router. The collector is off: what a hundred routers and a thousand workers hold is not one "
    "router's to look through.",
    "In so short a run few of the long prompts find their prefix at a worker that their router knows. Where "
    "a worker knows 4,096 tokens of a prompt, their hashes are most of a decision's cost: one after the "
    "other, on a busy machine, when all 32 workers were still looked at, 388 us where none of it known took "
    "90 us.",
]


@dataclass(slots=True)
class PaperWorker:
    """One worker by arithmetic."""

    name: str
    speed: float
    rows: float = 0.0  # that wait
    ends: list[tuple[float, int]] = field(default_factory=list)  # of running sequences, with their tokens
    tokens: int = 0
    digest: DigestMaker = field(default_factory=DigestMaker)
    seen: dict[str, int] = field(default_factory=dict)  # router -> its newest submission
    seq: int = 0

    def take(self, rows: int, tokens: int, now: float) -> float:
        """Returns the seconds to the first token."""
        self.rows += rows
        wait = self.rows / (ROWS_PER_S * self.speed)
        heappush(self.ends, (now + wait + OUTPUT_TOKENS * TOKEN_S / self.speed, tokens))
        self.tokens += tokens
        return wait

    def pass_time(self, now: float) -> None:
        self.rows = max(0.0, self.rows - TICK_S * ROWS_PER_S * self.speed)
        while self.ends and self.ends[0][0] <= now:
            self.tokens -= heappop(self.ends)[1]

    def report(self, now: float) -> WorkerReport:
        self.seq += 1
        return WorkerReport(
            seq=self.seq,
            num_running=len(self.ends),
            num_blocks=NUM_BLOCKS,
            headroom_tokens=max(0, NUM_BLOCKS * BLOCK - self.tokens),
            running_tokens=self.tokens,
            prefill_tokens=int(self.rows),
            step_time_s=TOKEN_S / self.speed,
            prefill_rate_tok_s=ROWS_PER_S * self.speed,
            decode_step_s=(0.8 * TOKEN_S / self.speed, 1e-5, 1e-7),
            max_running=256,
            last_submit_seq=tuple(self.seen.items()),
            prefix_digest=self.digest.packed(now),
        )


class PaperRouter:
    """One router's policy and its views."""

    def __init__(self, name: str, policy: str, seed: int, workers: set[str]) -> None:
        self.name = name
        self.policy = make_policy(policy, seed)
        self.views = {worker: Replica(worker, BLOCK) for worker in sorted(workers)}
        self.seqs = dict.fromkeys(self.views, 0)


@dataclass(slots=True)
class Times:
    """CPU seconds and bytes, each as it came; `waits` of simulated time."""

    decisions: list[float] = field(default_factory=list)
    hears: list[float] = field(default_factory=list)
    report_bytes: list[int] = field(default_factory=list)
    digest_bytes: list[int] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    entries: int = 0  # of a digest at the end, mean


class Scale:
    """One policy's run."""

    def __init__(self, policy: str, args: argparse.Namespace, shape: Shape) -> None:
        self._random = Random(args.seed)
        self.shape = shape
        names = [f"epoch-{number:04d}" for number in range(args.workers)]
        speeds = self._random.choices((1.0, 0.7), (0.8, 0.2), k=len(names))
        self.workers = {name: PaperWorker(name, speed) for name, speed in zip(names, speeds, strict=True)}
        self.routers = [
            PaperRouter(f"router-{n:03d}", policy, args.seed + n, subset(names, f"router-{n:03d}"))
            for n in range(args.routers)
        ]
        self._listeners: dict[str, list[PaperRouter]] = {name: [] for name in names}
        for router in self.routers:
            for name in router.views:
                self._listeners[name].append(router)
        self._per_tick = args.rate * shape.rate * TICK_S
        self._num_ticks = round(args.seconds / TICK_S)
        self._pool = [self._random.randrange(32_000) for _ in range(NUM_TOKENS)]
        self._stems = [self._tokens(shape.stem) for _ in range(NUM_STEMS)]
        self._late: deque[list[tuple[str, bytes]]] = deque([[] for _ in range(DELAY_TICKS)])
        self.times = Times()

    def run(self) -> Times:
        names = list(self.workers)
        gc.disable()  # the memory of a hundred routers is not one router's to look through
        due = 0.0
        for name in names:
            self._hear(name, self._pack(name, 0.0), 0.0)
        self.times.hears.clear()
        for tick in range(self._num_ticks):
            now = (tick + 1) * TICK_S
            for worker in self.workers.values():
                worker.pass_time(now)
            self._late.append(
                [(name, self._pack(name, now)) for name in names[tick % REPORT_TICKS :: REPORT_TICKS]]
            )
            for name, packed in self._late.popleft():
                self._hear(name, packed, now)
            due += self._per_tick
            while due >= 1.0:
                due -= 1.0
                self._request(now)
        self.times.entries = sum(len(worker.digest) for worker in self.workers.values()) // len(names)
        return self.times

    def _tokens(self, count: int) -> list[int]:
        begin = self._random.randrange(NUM_TOKENS - count)
        return self._pool[begin : begin + count]

    def _request(self, now: float) -> None:
        router = self._random.choice(self.routers)
        stem = self._random.choice(self._stems) if self._random.random() < SHARING else []
        prompt = stem + self._tokens(self.shape.tail)
        request = RoutedRequest(prompt, output_tokens=OUTPUT_TOKENS, session_id=f"{stem[:2]}")
        begun = thread_time()
        choice = router.policy.choose(request, list(router.views.values()), now)
        assert choice is not None
        view = router.views[choice.replica_id]
        rows = max(1, len(prompt) - choice.cached_tokens)
        router.seqs[choice.replica_id] += 1
        view.place(1, rows, len(prompt))
        view.sent(router.seqs[choice.replica_id], 1, rows, len(prompt), now)
        self.times.decisions.append(thread_time() - begun)
        worker = self.workers[choice.replica_id]
        worker.seen[router.name] = router.seqs[choice.replica_id]
        self.times.waits.append(worker.take(rows, len(prompt) + OUTPUT_TOKENS, now))
        for depth, block_hash in enumerate(block_hashes(prompt, BLOCK), 1):
            worker.digest.add(block_hash, depth)

    def _pack(self, name: str, now: float) -> bytes:
        report = self.workers[name].report(now)
        packed: bytes = msgpack.packb(wire.step(name, report.seq, [], report))
        self.times.report_bytes.append(len(packed))
        self.times.digest_bytes.append(len(report.prefix_digest))
        return packed

    def _hear(self, name: str, packed: bytes, now: float) -> None:
        for router in self._listeners[name]:
            begun = thread_time()
            message = wire.check(msgpack.unpackb(packed, use_list=False), "step")
            router.views[name].heard(wire.unpack_report(message[3]), router.name, now)
            self.times.hears.append(thread_time() - begun)


def row(policy: str, scale: Scale) -> Row:
    times = scale.times
    lines = sum(len(router.views) for router in scale.routers) / len(scale.routers)
    reports_s = lines / (REPORT_TICKS * TICK_S)
    report_bytes = float(np.mean(times.report_bytes))
    return {
        "policy": policy,
        "own tokens": scale.shape.tail,
        "in common": scale.shape.stem,
        "decisions": len(times.decisions),
        "decision, us": 1e6 * float(np.mean(times.decisions)),
        "p50, us": 1e6 * float(np.percentile(times.decisions, 50)),
        "p99, us": 1e6 * float(np.percentile(times.decisions, 99)),
        "taking a report, us": 1e6 * float(np.mean(times.hears)),
        "workers per router": lines,
        "view, bytes/s per router": reports_s * report_bytes,
        "of it digests": reports_s * float(np.mean(times.digest_bytes)),
        "digest entries": times.entries,
        "wait p50, s": float(np.percentile(times.waits, 50)),
        "wait p99, s": float(np.percentile(times.waits, 99)),
        **against_aim(1e6 * float(np.mean(times.decisions))),
    }


def against_aim(decision_us: float) -> Row:
    return {"ratio": round(AIM_US / decision_us, 3), "against": "the aim"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workers", type=int, default=1000)
    add("--routers", type=int, default=100)
    add("--rate", type=float, default=10_000.0, help="requests per second, over all routers")
    add("--seconds", type=float, default=5.0)
    add("--seed", type=int, default=1)
    add("--policies", nargs="+", default=sorted(POLICIES))
    add("--dry", action="store_true", help="write no result file")
    args = parser.parse_args(arguments)
    rows = []
    for policy, shape in product(args.policies, SHAPES):
        scale = Scale(policy, args, shape)
        scale.run()
        rows.append(row(policy, scale))
        print(rows[-1], flush=True)
    result = Result(
        name="routing-scale",
        title="Routing at scale, policies alone",
        about=_about(args),
        command=f"python -m ellm.loadtest.routing_scale --workers {args.workers} --routers {args.routers} "
        f"--rate {args.rate:g} --seconds {args.seconds:g} --policies {' '.join(args.policies)}",
        rows=rows,
        seed=args.seed,
        notes=NOTES,
    )
    if not args.dry:
        print(f"wrote {result.write()}")
    return 0


def _about(args: argparse.Namespace) -> str:
    kinds = "; ".join(
        f"{args.rate * shape.rate:g} requests per second with {shape.tail} tokens of their own, half of them "
        f"behind one of {NUM_STEMS} prefixes of {shape.stem}"
        for shape in SHAPES
    )
    return (
        f"{args.workers} workers (a fifth at 0.7 of the speed), {args.routers} routers with a subset of them "
        f"each, {args.seconds:g} s of two loads over all routers: {kinds}. Workers are arithmetic, reports "
        "are packed as on the wire, one per worker and 100 ms, and come 100 ms late. Times are CPU times of "
        "one core; a decision includes the prompt's hashes, as deep as some worker knows the prompt and one "
        "depth further, and the correction for what is in flight, and is to take 100 us at most. `view` is "
        "what a router takes in of all its workers, in bytes per second. Waits compare policies within this "
        "model alone."
    )


if __name__ == "__main__":
    raise SystemExit(main())
