"""Sequences whose KV is partly recomputed, streamed, or moved say the same as with all of it in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import golden
from support.checkpoints import write_checkpoint
from support.holes import Hole, HoleDriver
from support.plans import GREEDY, PlanDriver, Track

from ellm.worker.api.output import TokenLogprobs
from ellm.worker.executor.local import LocalExecutor

# More layers than banks, so that each bank is filled again within a step; an odd number of them.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 5}),
    "window": ("mistral", {"num_hidden_layers": 5, "sliding_window": 37}),
    "opt": ("opt", {"num_hidden_layers": 3}),
}
NEEDS_NUMBA = pytest.mark.needs_module("numba")
BODIES = [
    ("torch", "float32"),
    pytest.param(("numba", "float32"), marks=NEEDS_NUMBA),
    pytest.param(("numba", "bfloat16"), marks=NEEDS_NUMBA),
    pytest.param(("torch", "float32", "cuda"), marks=pytest.mark.gpu),
    pytest.param(("triton", "float32", "cuda"), marks=pytest.mark.gpu),
    pytest.param(("triton", "bfloat16", "cuda"), marks=pytest.mark.gpu),
]
PROMPT, DECODED, NUM_TOKENS = 22, 50, 62  # the holes lie in what prefill and decode wrote
HOLES = {
    "prefix": Hole(0, 3, 3),
    "middle": Hole(1, 4, 4),
    "streamed prefix": Hole(0, 0, 3),
    "streamed middle": Hole(1, 1, 4),
    "split": Hole(1, 2, 4),
    "split prefix": Hole(0, 3, 4),
}
OTHERS = {10: 60, 11: 33}  # seq_id -> prompt tokens
Outcome = tuple[list[int], list[TokenLogprobs]]


@pytest.fixture(scope="module", params=list(CASES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    family, overrides = CASES[request.param]
    write_checkpoint(folder, family, **overrides)
    return folder


@pytest.fixture(scope="module", params=BODIES, ids="-".join)
def engine(request: pytest.FixtureRequest, folder: Any) -> Iterator[LocalExecutor]:
    body, dtype, *device = request.param
    made = golden.executor(
        folder,
        jit=None if body == "triton" else body == "numba",
        deterministic=True if body == "triton" else None,
        dtype=dtype,
        device=device[0] if device else "cpu",
        num_blocks=40,
        transient_blocks=8,
        host_bytes=1 << 20,
    )
    yield made
    made.close()


def outcome(track: Track) -> Outcome:
    scores = [s for r in track.results for i, s in (r.logprobs or {}).items() if i in _names(track)]
    return list(track.outputs), scores


def _names(track: Track) -> tuple[int, ...]:
    """A sequence's ids: a residence with a hole has a hundred more."""
    return track.seq_id % 100, track.seq_id % 100 + 100


def kv_of(engine: LocalExecutor, track: Track, first: int, tokens: int) -> torch.Tensor:
    """[2, L, n, K, D] of the blocks from `first` to the last whole one below `tokens`."""
    blocks = torch.tensor(track.block_ids[first : tokens // golden.BLOCK_SIZE])
    return engine.runner.cache.resident[:, :, blocks].transpose(3, 4).flatten(2, 3)


def add(driver: PlanDriver, seq_id: int) -> Track:
    length = OTHERS.get(seq_id, PROMPT)
    return driver.add(seq_id, golden.prompt(length, seq_id), replace(GREEDY, logprobs=3))


@pytest.fixture(scope="module")
def alone(engine: LocalExecutor) -> dict[int, Outcome]:
    """Every sequence by itself with all its KV."""
    driver, outcomes = PlanDriver(engine), {}
    for seq_id in (1, 2, *OTHERS):
        track = add(driver, seq_id)
        driver.generate(seq_id, NUM_TOKENS if seq_id < 10 else 8)
        outcomes[seq_id] = outcome(track)
        driver.release(seq_id)
    return outcomes


def assert_same(engine: LocalExecutor, got: Outcome, want: Outcome) -> None:
    assert got[0] == want[0]
    if engine.deterministic:
        assert got[1] == want[1]
    else:
        assert [s.logprob for s in got[1]] == pytest.approx([s.logprob for s in want[1]], abs=1e-4)


@pytest.mark.parametrize("hole", list(HOLES.values()), ids=list(HOLES))
def test_a_hole_changes_nothing(engine: LocalExecutor, alone: dict[int, Outcome], hole: Hole) -> None:
    """Two sequences with holes beside others that are prefilled into the blocks which the holes gave up."""
    driver = HoleDriver(engine)
    tracks = [add(driver, 1), add(driver, 2)]
    for track in tracks:
        driver.generate(track.seq_id, DECODED)
    holes = {1: hole, 2: Hole(2, 3, 4)}
    for track in tracks:
        span = holes[track.seq_id]
        saves = driver.save(track.block_ids[span.middle : span.end])
        driver.settle(driver.step({}, saves=saves), saves)
        hosts = [save.host_block for save in saves]
        driver.punch(track.seq_id, track.seq_id + 100, span, hosts)
    for seq_id in OTHERS:
        add(driver, seq_id)
    while any(len(driver.tracks[i].outputs) < NUM_TOKENS for i in (101, 102)):
        rows = {i: 1 for i in (101, 102) if len(driver.tracks[i].outputs) < NUM_TOKENS}
        for i in OTHERS:
            track = driver.tracks[i]
            if len(track.outputs) < 8:
                rows[i] = min(17, len(track.tokens) - track.computed)
        driver.step(rows)
    for seq_id in alone:
        track = driver.tracks[seq_id if seq_id >= 10 else seq_id + 100]
        assert_same(engine, outcome(track), alone[seq_id])


def test_blocks_that_went_to_the_host_come_back_elsewhere(
    engine: LocalExecutor, alone: dict[int, Outcome]
) -> None:
    driver = HoleDriver(engine)
    track = add(driver, 1)
    driver.generate(1, DECODED)
    before = kv_of(engine, track, 0, track.computed).clone()
    old = list(track.block_ids)
    loads = driver.move(track, [0, 2, 3])
    assert not set(old) & {copy.block for copy in loads}
    assert not driver.failed
    size = engine.limits.block_bytes
    assert driver.moved == [3 * size, 3 * size]
    assert torch.equal(kv_of(engine, track, 0, track.computed), before)
    # Its residence in the executor ends: the table has changed.
    driver.punch(1, 101, Hole(0, 0, 0))
    driver.generate(101, NUM_TOKENS)
    assert_same(engine, outcome(driver.tracks[101]), alone[1])


def test_a_transient_block_holds_what_the_own_block_held(engine: LocalExecutor) -> None:
    """Tokens that decode rows wrote, computed again as a chunk: then the banks have the last layers'."""
    cache = engine.runner.cache
    driver = HoleDriver(engine)
    track = add(driver, 1)
    driver.generate(1, DECODED)
    saves = driver.save(track.block_ids[3:4])
    driver.settle(driver.step({}, saves=saves), saves)
    before = cache.resident[:, :, torch.tensor(track.block_ids[:4])].clone()
    holed = driver.punch(1, 101, Hole(0, 3, 4), [saves[0].host_block])
    driver.step({101: 1})
    places = torch.tensor(holed.block_ids[:4]) - engine.limits.num_blocks
    for layer in (cache.num_layers - 2, cache.num_layers - 1):
        got, want = cache.bank(layer)[:, places], before[:, layer]
        assert torch.equal(got[:, 3], want[:, 3]), "a streamed block"
        if engine.deterministic:
            assert torch.equal(got, want)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_holes_while_tokens_stay_with_the_executor_and_copies_run(
    engine: LocalExecutor, alone: dict[int, Outcome]
) -> None:
    """Decode rows that name no token; blocks leave and come back beside steps that do not read them."""
    driver = HoleDriver(engine, feed_back=False)
    tracks = {i: add(driver, i) for i in (1, 2)}
    for seq_id in tracks:
        driver.generate(seq_id, DECODED)
    saves = driver.save(tracks[1].block_ids[2:4]) + driver.save(tracks[2].block_ids[:3])
    result = driver.step({2: 1}, saves=saves)
    driver.settle(result, saves)
    hosts = {s.block: s.host_block for s in saves}
    stay = driver.punch(1, 101, Hole(1, 2, 4), [hosts[b] for b in tracks[1].block_ids[2:4]])
    leave = [hosts[b] for b in tracks[2].block_ids[:3]]
    gone = driver.punch(2, 102, Hole(0, 0, 3), leave)
    driver.step({101: 1, 102: 1})
    loads = [driver.copy(driver._free.pop(), host) for host in leave]
    driver.step({101: 1, 102: 1}, loads=loads)
    while not driver.done >= {load.copy_id for load in loads}:
        driver.step({101: 1})
    driver.fill(gone, 2, [load.block for load in loads])
    for track in (stay, gone):
        while len(track.outputs) < NUM_TOKENS:
            driver.step({i: 1 for i in driver.tracks if len(driver.tracks[i].outputs) < NUM_TOKENS})
    for seq_id, want in ((101, alone[1]), (2, alone[2])):
        assert_same(engine, outcome(driver.tracks[seq_id]), want)
