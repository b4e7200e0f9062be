"""Several ranks say what one rank says: the same tokens, in float32, wherever their KV is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from support import golden
from support.engine_driver import plain, play
from support.golden import Checkpoint
from support.plans import GREEDY, PlanDriver
from support.random_residency import RandomResidency
from support.ranks import RankPool

from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.executor.base import Executor

NUMBA = pytest.param(True, marks=pytest.mark.needs_module("numba"), id="numba")
PROMPTS = {1: 70, 2: 5, 3: 33}  # seq_id -> prompt tokens
CHUNKS = {1: 37, 2: 5, 3: 33}
NUM_TOKENS = 16
DRAWN = replace(GREEDY, temperature=0.9, top_k=40, seed=2**63 + 9)
PENALISED = replace(GREEDY, repetition_penalty=1.3, presence_penalty=0.2, logit_bias=((17, 2.0),))


def mixed(executor: Executor, *, feed_back: bool) -> dict[int, list[int]]:
    """Sequences that start at different steps, two at a time, greedy, drawn and penalised ones beside
    them."""
    driver = PlanDriver(executor, feed_back=feed_back)
    for seq_id, length in PROMPTS.items():
        driver.add(seq_id, golden.prompt(length, 10 + seq_id))
    driver.add(4, golden.prompt(9, 14), DRAWN)
    driver.add(5, golden.prompt(12, 15), PENALISED)
    for step in range(100):
        rows = {}
        for seq_id, track in driver.tracks.items():
            if step >= seq_id // 2 and len(track.outputs) < NUM_TOKENS:
                left = len(track.tokens) - track.computed
                rows[seq_id] = min(left, CHUNKS.get(seq_id, 64))
        if not rows:
            break
        driver.step(rows)
    return {seq_id: track.outputs for seq_id, track in driver.tracks.items()}


@pytest.mark.parametrize("jit", [pytest.param(False, id="torch"), NUMBA])
@pytest.mark.parametrize(
    ("case", "size"),
    [
        ("llama-biases", 2),  # biases that one rank adds, three key/value heads each
        ("mistral-shards", 2),  # several files, bfloat16 weights
        ("qwen3-window", 2),  # norms of heads
        ("opt-post-norm", 2),  # every bias, projected embeddings
        ("llama-8-heads", 4),  # key/value heads that two ranks share, a vocabulary with padding
        ("qwen2-8-heads", 4),  # a padded embedding that is the head, too
        pytest.param("opt-8-heads", 4, marks=pytest.mark.slow),
    ],
)
def test_ranks_say_what_transformers_says(
    ranks: RankPool, checkpoint: Callable[[str], Checkpoint], case: str, size: int, jit: bool
) -> None:
    folder, model = checkpoint(case)
    alone = golden.executor(folder, jit=jit)
    want = mixed(alone, feed_back=True)
    alone.close()
    # The halves of a step overlap on the torch body alone: two ways for the price of one.
    config = golden.config(folder, jit=jit, tensor_parallel_size=size, tp_overlap=not jit, tp_overlap_rows=2)
    with ranks.group(config) as executor:
        got = mixed(executor, feed_back=False)
        assert executor.limits.num_blocks == 128
    assert ranks.ends == ["closed"] * (size - 1)
    assert got == want
    for seq_id, length in PROMPTS.items():
        assert got[seq_id] == golden.greedy(model, golden.prompt(length, 10 + seq_id), NUM_TOKENS), seq_id


REQUEST = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, logprobs=0)
SHARED = tuple(golden.prompt(40, seed=99))


def requests() -> list[EngineRequest]:
    drawn = replace(REQUEST, temperature=0.8, top_k=40, seed=5)
    made = []
    for i in range(5):
        ids = (*(SHARED if i % 2 else ()), *golden.prompt(9 + 7 * i, seed=i))
        made.append(EngineRequest(f"r{i}", ids, drawn if i % 3 == 1 else REQUEST))
    return made


@pytest.mark.needs_module("numba")
@pytest.mark.parametrize(
    ("case", "size", "overlap"),
    [
        ("llama-8-heads", 2, True),
        ("qwen2-8-heads", 4, False),
        pytest.param("mistral-window", 2, False, marks=pytest.mark.slow),
        pytest.param("opt-8-heads", 4, True, marks=pytest.mark.slow),
    ],
)
def test_no_token_depends_on_residency(
    ranks: RankPool, checkpoint: Callable[[str], Checkpoint], case: str, size: int, overlap: bool
) -> None:
    """Parked, cut, saved, loaded, recomputed, streamed at random: bitwise the scores of the same ranks with
    room for all, and the tokens of one rank. Rows of holes run beside the others, or one layer ahead."""
    folder, _ = checkpoint(case)
    alone = golden.executor(folder, jit=True, num_blocks=200)
    tokens = play(alone, requests(), plain(max_num_seqs=1)).streams
    alone.close()
    room = {"transient_blocks": 20, "host_bytes": 1 << 20}
    settings = {"jit": True, "tensor_parallel_size": size, "tp_overlap": overlap, "tp_overlap_rows": 16}
    settings["recompute_ahead"] = "off" if overlap else "on"
    with ranks.group(golden.config(folder, num_blocks=200, **settings)) as executor:
        roomy = play(executor, requests(), plain(max_num_seqs=8, max_step_tokens=96))
    assert roomy.streams == tokens
    counts = [0, 0, 0]
    with ranks.group(golden.config(folder, num_blocks=10, **room, **settings)) as executor:
        for seed in range(2):
            rng = Random(seed)
            scheduler = plain(
                max_num_seqs=8, max_step_tokens=rng.choice([96, 192]), pipeline_depth=1 + seed % 2
            )
            driver = play(executor, requests(), scheduler, RandomResidency(seed))
            for name, stream in tokens.items():
                assert driver.streams[name] == stream, (seed, name)
                assert driver.outputs[name][-1].logprobs == roomy.outputs[name][-1].logprobs, (seed, name)
            plans = driver.plans
            counts[0] += sum(entry.recompute for plan in plans for entry in plan.entries)
            counts[1] += sum(len(plan.streams) for plan in plans)
            counts[2] += sum(len(plan.loads) for plan in plans)
    assert ranks.ends == ["closed"] * (size - 1)
    assert min(counts) > 0, counts
