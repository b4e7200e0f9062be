"""What a tick of the controller costs on a very large cluster: the brain and its messages, no network.

    python -m ellm.loadtest.controller_tick --workers 1000 --routers 100 --tenants 100 --ticks 60

Every worker's report changes between ticks and comes packed as on the wire; every router sends a note with
what its clients ask for, of each of the API keys, and gets the guidance with budgets of its own. Timed in CPU
time, one tick after the other: reading what came (the newest report of each worker), deciding, and writing
the guidance once; then one router's copy of it.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
from dataclasses import replace
from math import ceil
from random import Random
from time import thread_time

from ellm.cluster.api import wire
from ellm.cluster.api.actions import Advise
from ellm.cluster.api.config import ControllerConfig, ModelScale
from ellm.cluster.api.view import RouterNote, RouterView, TenantUse, View, WorkerView
from ellm.cluster.controller import GUIDANCE_PERIOD_S, Controller
from ellm.loadtest.result import Result, Row
from ellm.worker.api import wire as worker_wire
from ellm.worker.api.report import WorkerInfo, WorkerReport
from ellm.worker.api.wire import Message

LIMIT_MS = 200.0
BLOCKS, BLOCK = 4096, 16
DIGEST_BYTES = 2048


class PaperFleet:
    """Workers whose reports wander, and routers with clients."""

    def __init__(self, workers: int, routers: int, tenants: int, seed: int) -> None:
        self._random = Random(seed)
        self._routers, self._tenants = routers, tenants
        self._tick = 0
        digest = self._random.randbytes(DIGEST_BYTES)
        self._infos = [
            WorkerInfo(f"w{i}", f"e{i}", f"model-{i % 4}", f"n{i // 8}", 8192, BLOCK, BLOCKS, 32000, (1,),
                       "cuda", "bfloat16", False)
            for i in range(workers)
        ]  # fmt: skip
        seen = tuple((f"router-{i:03}-0123", 0) for i in range(min(32, routers)))
        self._reports = [
            WorkerReport(
                seq=0, num_blocks=BLOCKS, max_running=256, prefix_digest=digest, last_submit_seq=seen
            )
            for _ in range(workers)
        ]

    def packed(self) -> list[Message]:
        """The newest report of each worker."""
        self._tick += 1
        self._reports = [self._changed(report) for report in self._reports]
        return [worker_wire.pack_report(report) for report in self._reports]

    def _changed(self, report: WorkerReport) -> WorkerReport:
        draw = self._random.random
        return replace(
            report,
            seq=report.seq + 5,
            num_steps=report.num_steps + 10,
            num_running=int(200 * draw()),
            headroom_tokens=int(BLOCKS * BLOCK * draw()),
            running_tokens=int(BLOCKS * BLOCK * draw()),
            waiting_tokens=int(20_000 * draw()),
            uncached_token_ratio=0.3 * draw(),
            recompute_debt_s=0.2 * draw(),
            step_time_s=0.02 + 0.02 * draw(),
            prefill_rate_tok_s=8000 + 4000 * draw(),
            slo_attainment=0.9 + 0.1 * draw(),
        )

    def views(self, packed: list[Message]) -> tuple[WorkerView, ...]:
        return tuple(
            WorkerView(info, worker_wire.unpack_report(message), self._tick)
            for info, message in zip(self._infos, packed, strict=True)
        )

    def notes(self) -> list[Message]:
        return [wire.pack_note(self._note(i)) for i in range(self._routers)]

    def _note(self, router: int) -> RouterNote:
        draw = self._random.random
        uses = tuple(
            TenantUse(f"key{i}", 100.0, 10_000.0, 2 * draw(), 200 * draw()) for i in range(self._tenants)
        )
        return RouterNote(f"router-{router:03}-0123", self._tick, uses)

    def routers(self, notes: list[Message]) -> tuple[RouterView, ...]:
        return tuple(RouterView(wire.unpack_note(note), self._tick) for note in notes)


def measure(
    workers: int, routers: int, tenants: int, ticks: int, seed: int
) -> tuple[Row, dict[str, list[float]]]:
    """One row, and every single time in milliseconds."""
    fleet = PaperFleet(workers, routers, tenants, seed)
    config = ControllerConfig()
    brain = Controller(config, 1, [ModelScale(f"model-{i}", 1, workers) for i in range(4)])
    times: dict[str, list[float]] = {"read": [], "decide": [], "write": [], "copy": []}
    size = 0
    warm_up = ceil(2 * GUIDANCE_PERIOD_S / config.tick_s) + 1  # before that it lends nothing
    for tick in range(-warm_up, ticks):
        packed, notes = fleet.packed(), fleet.notes()
        if tick < 0:
            brain.tick(View(fleet.views(packed), fleet.routers(notes)), tick * config.tick_s)
            continue
        marks = [thread_time()]
        view = View(fleet.views(packed), fleet.routers(notes))
        marks.append(thread_time())
        actions = brain.tick(view, tick * config.tick_s)
        marks.append(thread_time())
        advise = next(action for action in actions if isinstance(action, Advise))
        message = wire.pack_guidance(advise.guidance)
        marks.append(thread_time())
        copy = pickle.dumps(wire.with_budgets(message, advise.budgets["router-000-0123"]), protocol=5)
        marks.append(thread_time())
        assert len(advise.guidance.workers) == workers
        assert len(advise.budgets) == routers
        size = len(copy)
        for name, start, end in zip(times, marks, marks[1:], strict=False):
            times[name].append(1000 * (end - start))
    totals = sorted(
        sum(parts) for parts in zip(*(times[n] for n in ("read", "decide", "write")), strict=True)
    )
    row: Row = {
        "workers": workers,
        "routers": routers,
        "API keys": tenants,
        "tick, ms": statistics.fmean(totals),
        "p99": totals[int(0.99 * (len(totals) - 1))],
        "worst": totals[-1],
        "read": statistics.fmean(times["read"]),
        "decide": statistics.fmean(times["decide"]),
        "write": statistics.fmean(times["write"]),
        "one router's copy, ms": statistics.fmean(times["copy"]),
        "KB/s per router": size / 1000,
        "within 200 ms": "yes" if totals[-1] <= LIMIT_MS else "no",
    }
    return row, times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    for name, default in (("workers", 1000), ("routers", 100), ("tenants", 100), ("ticks", 60), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dry", action="store_true", help="print, write no result file")
    args = parser.parse_args()
    cases = [(64, 8, 20), (args.workers, args.routers, 0), (args.workers, args.routers, args.tenants)]
    rows, raw = [], []
    for workers, routers, tenants in dict.fromkeys(cases):
        row, times = measure(workers, routers, tenants, args.ticks, args.seed)
        print(row)
        rows.append(row)
        raw.append({"workers": workers, "routers": routers, "tenants": tenants, "ms": times})
    result = Result(
        "controller-tick",
        "A tick of the controller",
        "The controller's brain with the messages it reads and writes at each tick, in one process and "
        "without a network, in CPU time. It ticks twice a second; the aim is 200 ms at 1,000 workers and 100 "
        "routers. A router asks once a second.",
        f"python -m ellm.loadtest.controller_tick --workers {args.workers} --routers {args.routers} "
        f"--tenants {args.tenants} --ticks {args.ticks}",
        rows,
        args.seed,
        raw=raw,
    )
    if not args.dry:
        print(result.write())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
