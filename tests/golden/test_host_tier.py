"""Policies with a real model, a starved pool and a host tier: what goes there and back changes no token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from support import golden
from support.engine_driver import EngineDriver, plain
from support.golden import Checkpoint

from ellm.worker.api.config import SchedulerConfig
from ellm.worker.api.output import TokenLogprobs
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.executor.local import LocalExecutor

pytestmark = pytest.mark.needs_module("numba")  # STRICT on a CPU is the numba body's

NUM_TOKENS = 60
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1)
STARVED = 14  # blocks: two sequences and a half


def requests() -> list[EngineRequest]:
    """Greedy, drawn and penalised."""
    drawn = replace(GREEDY, temperature=0.9, top_p=0.95, seed=11)
    penalised = replace(GREEDY, repetition_penalty=1.2, frequency_penalty=0.3)
    return [
        EngineRequest(f"r{i}", tuple(golden.prompt(20 + 9 * i, seed=i)), (GREEDY, drawn, penalised)[i % 3])
        for i in range(6)
    ]


def load(checkpoint: Checkpoint, num_blocks: int, host_bytes: int) -> LocalExecutor:
    return golden.executor(checkpoint[0], jit=True, num_blocks=num_blocks, host_bytes=host_bytes)


def run(executor: LocalExecutor, scheduler: SchedulerConfig) -> EngineDriver:
    driver = EngineDriver(executor.limits, scheduler=scheduler)
    driver.executor = executor  # type: ignore[assignment]
    for i, request in enumerate(requests()):
        assert driver.add(request)
        if i % 2:
            driver.turn()
    driver.run(max_turns=20_000)
    executor.close()
    return driver


def scores(driver: EngineDriver, name: str) -> list[TokenLogprobs]:
    return [s for output in driver.outputs[name] for s in output.logprobs or ()]


@pytest.fixture(scope="module")
def roomy(checkpoint: Callable[[str], Checkpoint]) -> EngineDriver:
    """Each alone, with room for all."""
    return run(load(checkpoint("qwen3"), 200, 0), plain(max_num_seqs=1))


def assert_same(driver: EngineDriver, roomy: EngineDriver) -> None:
    for name, stream in roomy.streams.items():
        assert len(stream) == NUM_TOKENS
        assert driver.streams[name] == stream, name
        assert scores(driver, name) == scores(roomy, name), name


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy", ["full-swap", "full-offload", "full-predictive", "adaptive"])
def test_what_went_to_the_host_and_back_says_the_same(
    roomy: EngineDriver, checkpoint: Callable[[str], Checkpoint], policy: str, depth: int
) -> None:
    executor = load(checkpoint("qwen3"), STARVED, 1 << 20)
    scheduler = SchedulerConfig(
        policy=policy, max_num_seqs=8, max_step_tokens=48, pipeline_depth=depth, tpot_slo_ms=200.0
    )
    driver = run(executor, scheduler)
    assert_same(driver, roomy)
    if policy in ("full-swap", "full-offload"):
        assert sum(len(plan.saves) for plan in driver.plans) > 5
    if policy == "full-swap":  # the other may find it quicker to compute again
        assert any(plan.loads for plan in driver.plans)


def test_copies_that_fail_cost_time_and_nothing_else(
    roomy: EngineDriver, checkpoint: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = load(checkpoint("qwen3"), STARVED, 1 << 20)
    assert executor._tier is not None
    pool, count = executor._tier.pool, 0

    def third_fails(move: Callable[[int, int], None]) -> Callable[[int, int], None]:
        def wrapped(source: int, target: int) -> None:
            nonlocal count
            count += 1
            if count % 3 == 0:
                raise OSError("the link is down")
            move(source, target)

        return wrapped

    monkeypatch.setattr(pool, "save", third_fails(pool.save))
    monkeypatch.setattr(pool, "load", third_fails(pool.load))
    scheduler = SchedulerConfig(policy="full-offload", max_num_seqs=8, max_step_tokens=48)
    driver = run(executor, scheduler)
    assert count > 6
    assert_same(driver, roomy)
