"""The brain with a real model: a starved pool, shared prefixes, resumed requests change no token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from support import golden
from support.engine_driver import EngineDriver, plain
from support.golden import Checkpoint

from ellm.kernels.dispatch import has_numba
from ellm.worker.api.config import SchedulerConfig
from ellm.worker.api.output import TokenLogprobs
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.executor.local import LocalExecutor

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=2)
SHARED = golden.prompt(50, seed=100)


def requests() -> list[EngineRequest]:
    """Greedy, drawn, penalised, scored; two choices of one prompt; half of them with a common prefix."""
    drawn = replace(GREEDY, temperature=0.9, top_p=0.95, seed=11)
    samplings = [
        GREEDY,
        drawn,
        replace(drawn, temperature=1.2, top_k=30, min_p=0.01),
        replace(GREEDY, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1),
        replace(GREEDY, min_tokens=40, logit_bias=((17, 2.0), (30, -5.0)), ignore_eos=False),
        replace(GREEDY, prompt_logprobs=1),
    ]
    made = []
    for i, sampling in enumerate(samplings):
        ids = (SHARED if i % 2 else []) + golden.prompt(9 + 7 * i, seed=i)
        made.append(EngineRequest(f"r{i}", tuple(ids), sampling))
        if i == 1:
            made.append(EngineRequest("r1-second", tuple(ids), sampling, choice_index=1))
    return made


def run(executor: LocalExecutor, *, scheduler: SchedulerConfig, prefix_caching: bool) -> EngineDriver:
    driver = EngineDriver(executor.limits, scheduler=scheduler, prefix_caching=prefix_caching)
    driver.executor = executor  # type: ignore[assignment]
    for i, request in enumerate(requests()):
        driver.add(request)
        if i % 2:
            driver.turn()
    driver.run()
    return driver


def scores(driver: EngineDriver, name: str) -> list[TokenLogprobs]:
    return [s for output in driver.outputs[name] for s in output.logprobs or ()]


@pytest.fixture(scope="module")
def roomy(checkpoint: Callable[[str], Checkpoint]) -> EngineDriver:
    """Every request with room for all, whole prompts, nothing cached."""
    executor = golden.executor(checkpoint("qwen3")[0], jit=has_numba(), num_blocks=200)
    return run(executor, scheduler=plain(max_num_seqs=1), prefix_caching=False)


def test_greedy_requests_say_what_transformers_says(
    roomy: EngineDriver, checkpoint: Callable[[str], Checkpoint]
) -> None:
    _, model = checkpoint("qwen3")
    for request in requests():
        if request.sampling in (GREEDY, replace(GREEDY, prompt_logprobs=1)):
            assert roomy.streams[request.request_id] == golden.greedy(model, request.prompt_ids, 40)
    first, second = roomy.streams["r1"], roomy.streams["r1-second"]
    assert first != second
    assert len(first) == len(second) == 40


@pytest.mark.needs_module("numba")  # STRICT on a CPU is the numba body's
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    ("num_blocks", "rows", "caching"), [(200, 48, True), (16, 40, False), (16, 33, True)]
)
def test_schedules_change_nothing(
    roomy: EngineDriver,
    checkpoint: Callable[[str], Checkpoint],
    depth: int,
    num_blocks: int,
    rows: int,
    caching: bool,
) -> None:
    executor = golden.executor(checkpoint("qwen3")[0], jit=True, num_blocks=num_blocks)
    config = plain(max_num_seqs=8, max_step_tokens=rows, pipeline_depth=depth)
    driver = run(executor, scheduler=config, prefix_caching=caching)
    report = driver.core.report(driver.now)
    if num_blocks == 16:
        assert report.num_preemptions > 0
    if caching:
        assert report.prefix_hits > 0
    for name, stream in roomy.streams.items():
        assert driver.streams[name] == stream, name
        assert scores(driver, name) == scores(roomy, name), name
    assert driver.outputs["r5"][0].prompt_logprobs == roomy.outputs["r5"][0].prompt_logprobs
    assert executor.runner.num_resident <= 8


@pytest.mark.needs_module("numba")  # STRICT on a CPU is the numba body's
def test_a_resumed_request_goes_on_as_it_would_have(
    roomy: EngineDriver, checkpoint: Callable[[str], Checkpoint]
) -> None:
    """As after a failover: another worker gets prompt and outputs apart, in the middle of the answer."""
    executor = golden.executor(checkpoint("qwen3")[0], jit=True, num_blocks=200)
    driver = EngineDriver(executor.limits)
    driver.executor = executor  # type: ignore[assignment]
    for i, request in enumerate(requests()):
        known = roomy.streams[request.request_id][: 5 + 4 * i]
        driver.add(replace(request, output_ids=tuple(known), attempt=1))
    driver.run()
    assert driver.streams == roomy.streams
