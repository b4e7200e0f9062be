"""STRICT: a sequence's tokens, scores and KV are bitwise the same in any company and any chunking."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from support import golden
from support.golden import Checkpoint
from support.plans import GREEDY, PlanDriver, Track

from ellm.worker.api.output import TokenLogprobs
from ellm.worker.api.request import SamplingParams
from ellm.worker.executor.local import LocalExecutor

NEEDS_NUMBA = pytest.mark.needs_module("numba")  # STRICT on a CPU is the numba body's
BODIES = [
    pytest.param("cpu float32", marks=NEEDS_NUMBA),
    pytest.param("cpu bfloat16", marks=NEEDS_NUMBA),
    pytest.param("cuda float32", marks=pytest.mark.gpu),
    pytest.param("cuda bfloat16", marks=pytest.mark.gpu),
]

NUM_TOKENS = 20
PROMPTS = {1: 61, 2: 3, 3: 18, 4: 120, 5: 1, 6: 32}  # seq_id -> prompt tokens
SAMPLING = {
    1: GREEDY,
    2: replace(GREEDY, temperature=0.9, seed=7),
    3: replace(GREEDY, temperature=1.1, top_k=40, top_p=0.9, seed=8),
    4: GREEDY,
    5: replace(GREEDY, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2),
    6: replace(GREEDY, temperature=0.8, min_p=0.02, seed=2**63 + 5),
}


@pytest.fixture(scope="module", params=BODIES)
def body(request: pytest.FixtureRequest) -> str:
    """Device and type."""
    return str(request.param)


@pytest.fixture(scope="module", params=["llama-wide-heads", "qwen3-window", "opt-post-norm", "qwen2"])
def engine(
    request: pytest.FixtureRequest, body: str, checkpoint: Callable[[str], Checkpoint]
) -> Iterator[LocalExecutor]:
    device, dtype = body.split()
    jit = True if device == "cpu" else None
    made = golden.executor(
        checkpoint(request.param)[0], jit=jit, deterministic=True, dtype=dtype, device=device
    )
    assert made.deterministic
    yield made
    made.close()


@dataclass
class Trace:
    """What one sequence left behind."""

    tokens: list[int]
    scores: list[TokenLogprobs]
    kv: torch.Tensor  # [layers, 2, tokens, K, D]


def sequence_kv(engine: LocalExecutor, track: Track) -> torch.Tensor:
    """[layers, 2, computed tokens, K, D] of one sequence, read from its blocks."""
    layers = engine.runner.cache.layers
    blocks = torch.tensor(track.block_ids)
    return torch.stack(
        [
            torch.stack([cache[blocks].transpose(1, 2).flatten(0, 1)[: track.computed] for cache in layer])
            for layer in layers
        ]
    )


def trace(engine: LocalExecutor, track: Track) -> Trace:
    scores = [(r.logprobs or {})[track.seq_id] for r in track.results if track.seq_id in (r.logprobs or {})]
    return Trace(list(track.outputs), scores, sequence_kv(engine, track))


def sampling(seq_id: int) -> SamplingParams:
    return replace(SAMPLING[seq_id], logprobs=3)


@pytest.fixture(scope="module")
def alone(engine: LocalExecutor) -> dict[int, Trace]:
    """Every sequence by itself, its prompt in one chunk."""
    traces = {}
    driver = PlanDriver(engine)
    for seq_id, length in PROMPTS.items():
        track = driver.add(seq_id, golden.prompt(length, seq_id), sampling(seq_id))
        driver.generate(seq_id, NUM_TOKENS)
        traces[seq_id] = trace(engine, track)
        driver.release(seq_id)
    return traces


def mixed(engine: LocalExecutor, seed: int) -> dict[int, Trace]:
    """All at once, each step a random choice of sequences and chunk sizes."""
    rng = random.Random(seed)
    driver = PlanDriver(engine, feed_back=seed % 2 == 0)
    waiting = list(PROMPTS)
    rng.shuffle(waiting)
    while any(len(t.outputs) < NUM_TOKENS for t in driver.tracks.values()) or waiting:
        if waiting and rng.random() < 0.4:
            seq_id = waiting.pop()
            driver.add(seq_id, golden.prompt(PROMPTS[seq_id], seq_id), sampling(seq_id))
        rows = {}
        for seq_id, track in driver.tracks.items():
            left = len(track.tokens) - track.computed
            if len(track.outputs) < NUM_TOKENS and rng.random() < 0.8:
                rows[seq_id] = min(left, rng.choice((1, 2, 7, 16, 17, 64)))
        if rows:
            driver.step(rows)
    return {seq_id: trace(engine, track) for seq_id, track in driver.tracks.items()}


def assert_equal(got: dict[int, Trace], want: dict[int, Trace]) -> None:
    assert got.keys() == want.keys()
    for seq_id, expected in want.items():
        assert got[seq_id].tokens == expected.tokens, seq_id
        assert got[seq_id].scores == expected.scores, seq_id
        assert torch.equal(got[seq_id].kv, expected.kv), seq_id


def test_company_and_chunking_change_nothing(engine: LocalExecutor, alone: dict[int, Trace]) -> None:
    assert any(len(set(t.tokens)) > 5 for t in alone.values())
    mixes = 2 if engine.device == "cpu" else 25
    for seed in range(1, 1 + mixes):
        assert_equal(mixed(engine, seed), alone)


def test_prefill_writes_what_decode_wrote(engine: LocalExecutor) -> None:
    """A sequence computed again from its tokens, as after a preemption, has the same KV and goes on alike."""
    driver = PlanDriver(engine)
    ids = golden.prompt(45, seed=9)
    decoded = driver.add(1, ids)
    driver.generate(1, 30)
    kv = sequence_kv(engine, decoded)
    again = driver.add(2, ids, outputs=decoded.outputs[:20])
    driver.generate(2, 30, chunk=48)
    assert again.outputs == decoded.outputs
    assert torch.equal(sequence_kv(engine, again), kv)
    joined = driver.add(3, ids + decoded.outputs[:29])
    driver.generate(3, 1)
    assert joined.outputs == decoded.outputs[29:]
    assert torch.equal(sequence_kv(engine, joined), kv)


def test_threads_change_nothing(engine: LocalExecutor, alone: dict[int, Trace]) -> None:
    threads = torch.get_num_threads()
    driver = PlanDriver(engine)
    tracks = [
        driver.add(seq_id, golden.prompt(PROMPTS[seq_id], seq_id), sampling(seq_id)) for seq_id in (1, 6)
    ]
    torch.set_num_threads(2)
    try:
        driver.step({1: 40, 6: 32})
        for left in (21, 1):
            driver.step({1: left, 6: 1})
    finally:
        torch.set_num_threads(threads)
    for track in tracks:
        want = alone[track.seq_id]
        assert track.outputs == want.tokens[: len(track.outputs)]
        assert torch.equal(sequence_kv(engine, track), want.kv[:, :, : track.computed])
