"""A real model under residency at random: parked, cut, saved, loaded, recomputed in the step, streamed,
preempted, found again by prefix, at any chunk size. Bitwise the tokens and scores of an engine with room for
all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from support import golden
from support.engine_driver import EngineDriver, plain, play
from support.golden import Checkpoint
from support.random_residency import RandomResidency

from ellm.worker.api.config import SchedulerConfig
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.engine.policies import Policy
from ellm.worker.executor.local import LocalExecutor

pytestmark = pytest.mark.needs_module("numba")  # STRICT on a CPU is the numba body's

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=0)
SHARED = tuple(golden.prompt(40, seed=99))


def requests() -> list[EngineRequest]:
    """Greedy, drawn, penalised; half of them with a prefix in common."""
    drawn = replace(GREEDY, temperature=0.8, top_k=40, seed=5)
    penalised = replace(GREEDY, repetition_penalty=1.3)
    made = []
    for i in range(6):
        head = SHARED if i % 2 else ()
        made.append(
            EngineRequest(
                f"r{i}", (*head, *golden.prompt(9 + 7 * i, seed=i)), (GREEDY, drawn, penalised)[i % 3]
            )
        )
    return made


def played(executor: LocalExecutor, scheduler: SchedulerConfig, policy: Policy | None = None) -> EngineDriver:
    driver = play(executor, requests(), scheduler, policy)
    executor.close()
    return driver


def load(folder: Checkpoint, dtype: str, num_blocks: int) -> LocalExecutor:
    return golden.executor(
        folder[0],
        jit=True,
        dtype=dtype,
        num_blocks=num_blocks,
        transient_blocks=20,
        host_bytes=1 << 20,
    )


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("llama", "bfloat16"),
        ("mistral-window", "float32"),
        pytest.param("llama", "float32", marks=pytest.mark.slow),
        pytest.param("mistral-window", "bfloat16", marks=pytest.mark.slow),
        pytest.param("opt", "float32", marks=pytest.mark.slow),
        pytest.param("opt", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_no_token_depends_on_residency(
    checkpoint: Callable[[str], Checkpoint], case: str, dtype: str
) -> None:
    folder = checkpoint(case)
    roomy = played(load(folder, dtype, 200), plain(max_num_seqs=1, pipeline_depth=1))
    recomputed = streamed = loaded = parks = 0
    for seed in range(4):
        rng = Random(seed)
        scheduler = plain(
            max_num_seqs=rng.choice([3, 8]),
            max_step_tokens=rng.choice([96, 192]),
            pipeline_depth=rng.choice([1, 2]),
        )
        driver = played(load(folder, dtype, rng.choice([9, 10, 14])), scheduler, RandomResidency(seed))
        for name, stream in roomy.streams.items():
            assert driver.streams[name] == stream, (seed, name)
            assert driver.outputs[name][-1].logprobs == roomy.outputs[name][-1].logprobs, (seed, name)
        recomputed += sum(entry.recompute for plan in driver.plans for entry in plan.entries)
        streamed += sum(len(plan.streams) for plan in driver.plans)
        loaded += sum(len(plan.loads) for plan in driver.plans)
        parks += driver.core.report(0.0).num_parks
    assert min(recomputed, streamed, loaded, parks) > 0, (recomputed, streamed, loaded, parks)


@pytest.mark.parametrize("policy", ["literal(0.3)", "literal(0.5, stream=0.5)", "literal(0.4, stream=1.0)"])
def test_literal_recompute_says_the_same(checkpoint: Callable[[str], Checkpoint], policy: str) -> None:
    folder = checkpoint("llama")
    roomy = played(load(folder, "float32", 200), plain(max_num_seqs=1))
    scheduler = SchedulerConfig(policy=policy, max_num_seqs=8, max_step_tokens=192)
    driver = played(load(folder, "float32", 14), scheduler)
    assert driver.streams == roomy.streams
    rows = sum(entry.num_tokens for plan in driver.plans for entry in plan.entries if entry.recompute)
    assert rows > 0 or "stream=1.0" in policy
    assert any(plan.streams for plan in driver.plans) or "stream" not in policy
