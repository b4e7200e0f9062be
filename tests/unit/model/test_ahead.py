"""Rows of holes one layer ahead: another order of launches, the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import golden
from support.checkpoints import write_checkpoint
from support.engine_driver import EngineDriver, plain
from support.holes import Hole, HoleDriver
from support.plans import GREEDY
from support.random_residency import RandomResidency
from torch import Tensor

from ellm.kernels.ops import AttentionMeta
from ellm.kernels.reference import TorchOps
from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.engine.plan import PlanEntry
from ellm.worker.executor.resolve import hole_ways
from ellm.worker.model.ahead import sides

LAYERS = 5  # more than banks, and odd
Launch = tuple[str, int, int]  # (rows of holes or others, layer, rows)


class Noting(TorchOps):
    """torch's operations, which say what was attended or stored and in which order."""

    def __init__(self, first: int, layer_bytes: int) -> None:
        self._first, self._layer_bytes = first, layer_bytes
        self.launches: list[Launch] = []

    def rotary_store(
        self, q: Tensor, k: Tensor, v: Tensor, meta: AttentionMeta, kv: Any, heads: Any
    ) -> Tensor:
        layer = (kv[0].data_ptr() - self._first) // self._layer_bytes
        kinds = {0: "others", len(meta.kv_lens): "holes"}
        self.launches.append((kinds.get(meta.num_recompute, "together"), layer, q.shape[0]))
        return super().rotary_store(q, k, v, meta, kv, heads)


def said(folder: Path, **switches: Any) -> tuple[list[list[int]], list[Launch]]:
    """Tokens of two sequences, one of which gets a hole; what a step with the hole launched."""
    executor = golden.executor(
        folder, jit=False, num_blocks=24, transient_blocks=4, host_bytes=1 << 19, **switches
    )
    driver = HoleDriver(executor)
    tracks = [driver.add(i, golden.prompt(length, i), GREEDY) for i, length in ((1, 70), (2, 20))]
    driver.step({1: 70, 2: 20})
    for _ in range(3):
        driver.step({1: 1, 2: 1})
    saves = driver.save(tracks[0].block_ids[3:4])
    driver.settle(driver.step({}, saves=saves), saves)
    holed = driver.punch(1, 101, Hole(1, 3, 4), [save.host_block for save in saves])
    late = driver.add(3, golden.prompt(30, 3), GREEDY)
    cache = executor.runner.cache
    keys = cache.layers[0][0]
    noting = Noting(keys.data_ptr(), keys.numel() * keys.element_size())
    executor.runner._ops = noting
    driver.step({101: 1, 2: 1, 3: 11})  # a chunk beside them
    launches = list(noting.launches)
    driver.step({101: 1, 2: 1, 3: 19})
    for _ in range(12):
        driver.step({101: 1, 2: 1, 3: 1})
    executor.close()
    return [list(holed.outputs), list(tracks[1].outputs), list(late.outputs)], launches


@pytest.mark.parametrize("family", ["llama", pytest.param("opt", marks=pytest.mark.slow)])
def test_the_order_differs_and_the_tokens_do_not(tmp_path: Path, family: str) -> None:
    write_checkpoint(tmp_path, family, num_hidden_layers=LAYERS)
    tokens, beside = said(tmp_path)
    again, ahead = said(tmp_path, recompute_ahead="on")
    assert again == tokens
    assert beside == [("together", layer, 2 + 11 + 32) for layer in range(LAYERS)]
    order = [("holes", 0, 32)]
    for layer in range(LAYERS):
        order += [("holes", layer + 1, 32)] * (layer + 1 < LAYERS) + [("others", layer, 13)]
    assert ahead == order


def test_what_cannot_run_ahead_is_left_beside_the_others() -> None:
    def plan(*entries: PlanEntry) -> Any:
        return type("Plan", (), {"entries": entries})

    def again(start: int, table: list[int]) -> PlanEntry:
        return PlanEntry(1, start, 16, (0,) * 16, table, False, recompute=True)

    row = PlanEntry(1, 40, 1, (0,), [3, 90, 4], True)
    chosen = sides(plan(row, again(16, [3, 90, 4])), 90, 16)
    assert chosen is not None
    assert chosen.tolist() == [0, 1]
    assert sides(plan(row, again(16, [91, 90, 4])), 90, 16) is None, "its prefix is streamed"
    assert sides(plan(again(0, [90])), 90, 16) is None
    assert sides(plan(row), 90, 16) is None


@pytest.mark.parametrize(
    ("fused", "ahead", "ways"),
    [
        ("off", "off", ("apart",)),
        ("on", "off", ("fused",)),
        ("auto", "off", ("apart", "fused")),
        ("auto", "auto", ("apart", "fused", "ahead")),
        ("on", "auto", ("fused", "ahead")),
        ("auto", "on", ("ahead",)),
    ],
)
def test_switches_say_what_there_is_to_choose_from(fused: Any, ahead: Any, ways: tuple[str, ...]) -> None:
    config = WorkerConfig(fused_attention=fused, recompute_ahead=ahead)
    triton, strict = TorchOps(), TorchOps()
    triton.name = strict.name = "triton"
    strict.deterministic = True
    assert hole_ways(config, triton) == (), "no transient blocks, no holes"
    object.__setattr__(config.cache, "transient_blocks", 4)
    assert hole_ways(config, triton) == ways
    never = tuple(way for way in ways if way != "fused" or fused == "on")
    assert hole_ways(config, strict) == never, "with STRICT nothing is fused by time"
    other = tuple(dict.fromkeys("apart" if way == "fused" else way for way in ways))
    assert hole_ways(config, TorchOps()) == other, "no such launch"


def test_an_engine_that_chooses_says_the_same(tmp_path: Path) -> None:
    """With holes, streams and copies at random, step by step in either way. When copies end is the machine's
    to say, and with it what is computed again: it is tried until something was."""
    write_checkpoint(tmp_path, "llama", num_hidden_layers=3)
    streams: list[dict[str, list[int]]] = []
    for switch, expected in (("off", {None}), ("auto", {"apart", "ahead"})):
        ways: set[str | None] = set()
        for seed in range(3, 13):
            said, seen = random_holes(tmp_path, switch, seed)
            streams.append(said)
            ways |= seen
            if ways == expected:
                break
        assert ways == expected
    assert all(said == streams[0] for said in streams)


def random_holes(folder: Path, switch: str, seed: int) -> tuple[dict[str, list[int]], set[str | None]]:
    """What an engine said, and the ways of its plans with rows of holes."""
    room = {"num_blocks": 10, "transient_blocks": 20, "host_bytes": 1 << 20}
    executor = golden.executor(folder, jit=False, recompute_ahead=switch, **room)
    driver = EngineDriver(
        executor.limits, scheduler=plain(max_num_seqs=8, max_step_tokens=96), policy=RandomResidency(seed)
    )
    driver.executor = executor  # type: ignore[assignment]
    for i in range(5):
        sampling = SamplingParams(temperature=(0.0, 0.8)[i % 2], seed=i, max_tokens=25, ignore_eos=True)
        driver.add(EngineRequest(f"r{i}", tuple(golden.prompt(10 + 11 * i, i)), sampling))
        driver.turn()
    driver.run(max_turns=20_000)
    executor.close()
    again = [plan for plan in driver.plans if plan.entries and plan.entries[-1].recompute]
    return driver.streams, {plan.way for plan in again}


def test_no_hole_no_difference(tmp_path: Path) -> None:
    """Not even an input is split."""
    write_checkpoint(tmp_path, "llama")
    executor = golden.executor(tmp_path, jit=False, transient_blocks=2, recompute_ahead="on")
    executor.runner._inputs.halves = None  # type: ignore[assignment,method-assign]
    driver = HoleDriver(executor)
    track = driver.add(1, golden.prompt(20, 1), GREEDY)
    driver.step({1: 20})
    driver.step({1: 1})
    assert len(track.outputs) == 2
    assert torch.isfinite(executor.runner.cache.resident).all()
    executor.close()
