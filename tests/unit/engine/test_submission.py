"""What is refused at the door, and under which name."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.engine_driver import LIMITS, EngineDriver, plain, request

from ellm.worker.api.config import SchedulerConfig, WorkerConfig
from ellm.worker.api.errors import ConfigError, InvalidRequest, PromptTooLong, QueueFull
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.engine.core import EngineCore
from ellm.worker.engine.policies import make_policy

PARAMS = {
    "temperature": (-0.1, float("nan"), float("inf")),
    "top_k": (-1,),
    "top_p": (0.0, 1.1, float("nan")),
    "min_p": (-0.1, 1.5),
    "repetition_penalty": (0.0, -1.0, float("nan")),
    "presence_penalty": (float("nan"), float("inf")),
    "frequency_penalty": (float("-inf"),),
    "seed": (-1, 2**64),
    "logprobs": (-1, 51),
    "prompt_logprobs": (-1, 51),
    "logit_bias": (((50, 1.0),), ((-1, 1.0),), ((3, float("nan")),)),
    "max_tokens": (0, -1),
    "min_tokens": (-1, 17),
}


def core() -> EngineCore:
    return EngineCore(LIMITS, WorkerConfig())


@pytest.mark.parametrize(("param", "value"), [(p, v) for p, values in PARAMS.items() for v in values])
def test_a_bad_field_is_named(param: str, value: object) -> None:
    bad = request("r", sampling=replace(SamplingParams(), **{param: value}))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest) as refused:
        core().add_request(bad, 0.0)
    assert refused.value.param == param


@pytest.mark.parametrize("name", ["tpot_slo_s", "ttft_slo_s"])
@pytest.mark.parametrize("value", [0.0, -0.05, float("nan"), float("inf"), 3600.1, 10**30, "0.1", True])
def test_an_slo_is_a_time_that_can_be_kept(name: str, value: object) -> None:
    engine = core()
    with pytest.raises(InvalidRequest) as refused:
        engine.add_request(request("r", **{name: value}), 0.0)
    assert refused.value.param == name
    assert not engine.has_work
    for fine in (None, 1e-6, 3600.0, 1):
        assert engine.add_request(request(f"r{fine}", **{name: fine}), 0.0)


@pytest.mark.parametrize("priority", [2**31, -(2**31), 0.5, True, None])
def test_a_priority_is_an_integer(priority: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        core().add_request(request("r", priority=priority), 0.0)
    assert refused.value.param == "priority"


@pytest.mark.parametrize("prompt", [(), (50,), (-1,), (3, 10**30), (1.0,), (True,), ("1",), (None,)])
def test_a_prompt_is_tokens_of_the_vocabulary(prompt: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        core().add_request(EngineRequest("r", prompt, SamplingParams()), 0.0)
    assert refused.value.param == "prompt"


def test_output_that_came_with_a_move_is_checked_too() -> None:
    with pytest.raises(InvalidRequest, match="token ids"):
        core().add_request(request("r", output_ids=(50,)), 0.0)
    with pytest.raises(InvalidRequest, match="nothing is left"):
        core().add_request(request("r", output_ids=(1, 2), max_tokens=2), 0.0)


@pytest.mark.parametrize(
    ("num_blocks", "num_prompt", "max_tokens", "limit"),
    [(64, 128, 1, 128), (64, 100, 29, 128), (20, 80, 1, 80), (20, 60, 21, 80)],
)
def test_what_can_never_fit_is_refused_with_the_limits(
    num_blocks: int, num_prompt: int, max_tokens: int, limit: int
) -> None:
    engine = EngineCore(replace(LIMITS, num_blocks=num_blocks), WorkerConfig())
    assert engine.max_total_tokens == limit
    with pytest.raises(PromptTooLong) as refused:
        engine.add_request(request("r", num_prompt, max_tokens=max_tokens), 0.0)
    for number in (num_prompt, max_tokens, limit):
        assert str(number) in refused.value.message


@pytest.mark.parametrize("num_prompt", [1, 79])
def test_the_longest_that_fits_runs_to_its_end(num_prompt: int) -> None:
    driver = EngineDriver(replace(LIMITS, num_blocks=20))
    driver.add(request("r", num_prompt, max_tokens=80 - num_prompt, ignore_eos=True))
    driver.run()
    assert len(driver.streams["r"]) == 80 - num_prompt


def test_a_refused_request_leaves_nothing_behind() -> None:
    engine = core()
    with pytest.raises(InvalidRequest):
        engine.add_request(request("r", temperature=-1.0), 0.0)
    assert not engine.has_work
    assert engine.add_request(request("r"), 0.0)


def test_a_full_queue_says_when_to_come_back() -> None:
    driver = EngineDriver(scheduler=plain(max_waiting=30, max_num_seqs=1))
    for i in range(30):
        driver.add(request(f"r{i}", max_tokens=100))
    with pytest.raises(QueueFull) as refused:
        driver.add(request("late"))
    assert refused.value.retry_after_s == 1.0  # nothing is known yet
    while driver.core.report(0.0).num_waiting > 20:
        driver.turn()
    for i in range(10):
        driver.add(request(f"more{i}", max_tokens=100))
    with pytest.raises(QueueFull) as refused:
        driver.add(request("late"))
    assert refused.value.retry_after_s is not None
    # One at a time, 100 steps of some 10 ms each: three of thirty are done in about 3 s.
    assert refused.value.retry_after_s == pytest.approx(3.0, rel=0.2)


@pytest.mark.parametrize(
    "change",
    [
        {"max_num_seqs": 0},
        {"max_step_tokens": 0},
        {"max_waiting": 0},
        {"pipeline_depth": 3},
        {"watermark": 1.0},
    ],
)
def test_a_setting_that_cannot_work_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError) as refused:
        EngineCore(LIMITS, WorkerConfig(scheduler=replace(plain(), **change)))  # type: ignore[arg-type]
    assert refused.value.param == f"scheduler.{next(iter(change))}"


def test_an_unknown_policy_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'best'.*full-chunked"):
        make_policy(SchedulerConfig(policy="best"))
