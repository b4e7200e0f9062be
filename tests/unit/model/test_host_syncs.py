"""A step is asked for without a look at any result: the host waits for the token copy alone.

The Triton body's launches are made and run nothing, on tensors that lie on a CPU and stand for a GPU's: what
would wait for a GPU is seen by what reads values.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import golden
from support.checkpoints import write_checkpoint
from support.holes import Hole, HoleDriver
from support.plans import GREEDY, PlanDriver
from support.replays import CallAgain
from support.syncs import host_reads
from support.tree import ROOT

from ellm.kernels import dispatch
from ellm.worker.api.request import SamplingParams
from ellm.worker.engine.plan import BatchPlan
from ellm.worker.executor.local import LocalExecutor
from ellm.worker.executor.resolve import select_ops
from ellm.worker.model.computation import Alone
from ellm.worker.model.graphs import DecodeGraphs, DecodeSizes
from ellm.worker.model.pieces import PieceGraphs

pytestmark = pytest.mark.needs_module("triton")
LAYERS = 3
EVERYTHING = SamplingParams(
    temperature=0.9,
    top_k=20,
    top_p=0.9,
    min_p=0.01,
    seed=5,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias=((3, 1.0),),
    logprobs=2,
    max_tokens=1 << 20,
)
DRAWN = SamplingParams(temperature=1.0, seed=3, max_tokens=1 << 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    write_checkpoint(made, "llama", num_hidden_layers=LAYERS)
    return made


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that would have been launched."""
    from triton.runtime.jit import JITFunction

    names: list[str] = []

    def run(self: Any, *_: Any, **__: Any) -> None:
        names.append(self.__name__)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(dispatch, "triton_problem", lambda device: None)
    return names


@pytest.fixture
def load(
    folder: Path, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., LocalExecutor]]:
    """Executors whose operations are Triton's."""
    made = []

    def load(*, deterministic: bool = False, **switches: Any) -> LocalExecutor:
        body = dispatch.triton_body("cpu", deterministic=deterministic, fused=True)
        monkeypatch.setattr(f"{select_ops.__module__}.dispatch.select", lambda *_, **__: body)
        room = {"num_blocks": 24, "transient_blocks": 4, "host_bytes": 1 << 19}
        with host_reads():  # memory that no kernel writes is zero
            made.append(golden.executor(folder, jit=False, **room, **switches))
        return made[-1]

    yield load
    for executor in made:
        executor.close()


class Watched:
    """Executes each plan in its two halves, and notes what reads values in the first."""

    def __init__(self, executor: LocalExecutor) -> None:
        self._executor = executor
        self.limits, self.runner = executor.limits, executor.runner
        self.while_asking: list[str] = []
        self.while_reading: list[list[str]] = []

    def execute(self, plan: BatchPlan) -> Any:
        with host_reads() as found:
            step = self._executor.begin(plan)
            self.while_asking += found
            found.clear()
            result = step.result()
            self.while_reading.append(list(found))
        return result

    def close(self) -> None: ...


def record(executor: LocalExecutor) -> None:
    """Steps are replayed, as far as they can be without a GPU."""
    runner = executor.runner
    sizes = DecodeSizes((4,), (512,))
    decode = DecodeGraphs(runner.model, runner.ops, runner.cache, sizes, Alone(), CallAgain())
    pieces = PieceGraphs(runner.model, LAYERS, (16, 64), runner.cache.device, Alone(), CallAgain())
    with host_reads():
        decode.record_all()
        pieces.record_all()
    runner.replay(decode)
    runner.replay_pieces(pieces)


SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "STRICT": {"deterministic": True},
    "fused": {"fused_attention": "on"},
    "ahead": {"recompute_ahead": "on"},
    "recorded": {"fused_attention": "on"},
}


@pytest.mark.parametrize("name", list(SWITCHES))
def test_no_step_waits_for_a_result(load: Any, launches: list[str], name: str) -> None:
    """A prompt, a chunk beside decode rows, decode rows whose token the executor knows, and a hole that is
    recomputed and streamed; one sequence with everything that a sampler can do."""
    executor = load(**SWITCHES[name])
    if name == "recorded":
        record(executor)
    watched = Watched(executor)
    driver = HoleDriver(watched, feed_back=False)  # type: ignore[arg-type]
    tracks = [
        driver.add(i, golden.prompt(length, i), sampling)
        for i, (length, sampling) in enumerate(((70, GREEDY), (20, EVERYTHING), (5, DRAWN)), 1)
    ]
    launches.clear()
    driver.step({1: 41, 2: 20, 3: 5})
    driver.step({1: 29, 2: 1, 3: 1})
    driver.step({1: 1, 2: 1, 3: 1})
    saves = driver.save(tracks[0].block_ids[3:4])
    driver.settle(driver.step({}, saves=saves), saves)
    driver.punch(1, 101, Hole(1, 3, 4), [save.host_block for save in saves])
    for _ in range(3):
        driver.step({101: 1, 2: 1, 3: 1})
    assert watched.while_asking == []
    assert all(set(names) <= {"tolist"} for names in watched.while_reading)
    assert ["tolist"] * 5 in watched.while_reading, "tokens, and scores where they were asked for"
    assert {"sample_kernel", "penalise_kernel", "score_kernel", "rotary_store_kernel"} <= set(launches)
    assert ("attend_both_kernel" in launches) == (name in ("fused", "recorded"))


def test_two_halves_wait_for_nothing(load: Any) -> None:
    """As ranks split a step."""
    executor = load()
    executor.runner._overlap_rows = 2
    watched = Watched(executor)
    driver = PlanDriver(watched)  # type: ignore[arg-type]
    for i in (1, 2, 3, 4):
        driver.add(i, golden.prompt(10, i), replace(GREEDY, seed=i))
    driver.step(dict.fromkeys((1, 2, 3, 4), 10))
    driver.step(dict.fromkeys((1, 2, 3, 4), 1))
    assert watched.while_asking == []
    assert watched.while_reading == [["tolist"]] * 2


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: int(x.sum()),
        lambda x: range(x[1]),
        lambda x: not x.any(),
        lambda x: torch.where(x > 0),
        lambda x: torch.unique(x),
        lambda x: torch.repeat_interleave(x),
        lambda x: torch.masked_select(x, x > 1),
    ],
)
def test_what_waits_is_seen(read: Callable[[Any], Any]) -> None:
    values = torch.arange(4)
    with host_reads() as found:
        read(values)
    assert found
    with host_reads() as found:
        values.index_select(0, values).masked_fill_(values > 1, 0).to(torch.int32)
        values[values.clone()] = values[values]
        torch.where(values > 1, values, 0)
    assert found == []


WAITS = {"synchronize", "set_sync_debug_mode"}
ALLOWED = {
    ("worker/model/staging.py", "wait"),  # the token copy
    ("worker/model/cuda_host_pool.py", "close"),
}


def test_streams_and_events_are_waited_for_in_one_place() -> None:
    found = set()
    for folder in ("kernels", "worker/model"):
        for path in sorted((ROOT / folder).glob("*.py")):
            for function in ast.walk(ast.parse(path.read_text())):
                if isinstance(function, ast.FunctionDef):
                    names = {n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute)}
                    if names & WAITS:
                        found.add((path.relative_to(ROOT).as_posix(), function.name))
    assert found == ALLOWED
