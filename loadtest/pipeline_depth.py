"""Whether planning a step while the former one runs pays on this machine.

    python -m ellm.loadtest.pipeline_depth [MODEL] [--batch 1 8 32] [--threads 1] [--rounds 5]

Three engines on the same checkpoint decode the same requests in turn: `direct` plans and computes in one
thread (no loop at all), `depth 1` and `depth 2` are EngineLoop with its step thread.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

from ellm.loadtest.result import Result, command_line
from ellm.worker.actor import SWITCH_INTERVAL_S
from ellm.worker.api.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.build import LoadedEngine, load_engine
from ellm.worker.loop import EngineLoop

PROMPT_TOKENS = 64


def make_requests(batch: int, tokens: int, tag: str) -> list[EngineRequest]:
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return [
        EngineRequest(f"{tag}-{i}", tuple(3 + (7 * i + 5 * j) % 500 for j in range(PROMPT_TOKENS)), sampling)
        for i in range(batch)
    ]


class Direct:
    """Begin, execute, finish, one after the other in the caller's thread."""

    def __init__(self, loaded: LoadedEngine) -> None:
        self._loaded = loaded

    def run(self, requests: list[EngineRequest]) -> float:
        core, executor = self._loaded.core, self._loaded.executor
        begin = time.perf_counter()
        for request in requests:
            core.add_request(request, begin)
        while (plan := core.begin_step(time.perf_counter())) is not None:
            core.finish_step(plan, executor.execute(plan), time.perf_counter())
        return time.perf_counter() - begin

    def close(self) -> None:
        self._loaded.executor.close()


class Looped:
    """EngineLoop as a worker runs it."""

    def __init__(self, loaded: LoadedEngine) -> None:
        self._loop = EngineLoop(loaded.core, loaded.executor)
        self._left = 0
        self._done = threading.Event()
        self._loop.start(self._publish)

    def run(self, requests: list[EngineRequest]) -> float:
        self._left = len(requests)
        self._done.clear()
        begin = time.perf_counter()
        self._loop.submit("bench", 0, requests)
        assert self._done.wait(300)
        return time.perf_counter() - begin

    def close(self) -> None:
        assert self._loop.stop(60)

    def _publish(self, outputs: list[SequenceOutput]) -> None:
        self._left -= sum(output.finish_reason is not None for output in outputs)
        if not self._left:
            self._done.set()


def engines(config: WorkerConfig) -> dict[str, Direct | Looped]:
    def load(depth: int) -> LoadedEngine:
        scheduler = replace(config.scheduler, pipeline_depth=depth)
        return load_engine(replace(config, scheduler=scheduler), lambda what, share: None)

    return {"direct": Direct(load(1)), "depth 1": Looped(load(1)), "depth 2": Looped(load(2))}


def measure(
    run: Callable[[str, list[EngineRequest]], float], names: list[str], batch: int, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Decode tokens per second of each engine, one value a round; the order turns each round."""
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(args.rounds + 1):  # the first warms up
        for name in names if i % 2 else reversed(names):
            took = run(name, make_requests(batch, args.tokens, f"{name}{batch}r{i}"))
            if i:
                speeds[name].append(batch * args.tokens / took)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", default="deploy/bundled/pydoc-5m")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    config = WorkerConfig(
        model=ModelConfig(path=args.model),
        cache=CacheConfig(num_blocks=1024, prefix_caching=False),
        scheduler=SchedulerConfig(max_num_seqs=64, max_step_tokens=512),
        num_threads=args.threads,
    )
    sides = engines(config)
    rows, raw = [], {}
    for batch in args.batch:
        speeds = measure(lambda name, requests: sides[name].run(requests), list(sides), batch, args)
        rows.append(row(batch, speeds))
        raw[str(batch)] = speeds
        print(rows[-1], flush=True)
    for side in sides.values():
        side.close()
    result = Result(
        name="pipeline-depth",
        title="One plan ahead or none, on a CPU",
        about=(
            f"Decode tokens per second of {args.model}, {args.threads} thread(s), {PROMPT_TOKENS} prompt and "
            f"{args.tokens} output tokens; `direct` plans and computes in one thread."
        ),
        command=command_line("ellm.loadtest.pipeline_depth"),
        rows=rows,
        raw=raw,
    )
    if not args.no_write:
        print(result.write())


def row(batch: int, speeds: dict[str, list[float]]) -> dict[str, Any]:
    pairs = zip(speeds["depth 2"], speeds["depth 1"], strict=True)
    return {
        "requests": batch,
        **{f"{name}, tokens/s": median(values) for name, values in speeds.items()},
        "depth 2 / depth 1": median(two / one for two, one in pairs),
    }


if __name__ == "__main__":
    main()
