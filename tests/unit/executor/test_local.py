"""Loading an executor: what "auto" becomes, what is refused, and that threads and memory are looked after."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import write_checkpoint
from support.plans import PlanDriver

from ellm.worker.api.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.api.request import SamplingParams
from ellm.worker.engine.plan import BatchPlan
from ellm.worker.executor.local import LocalExecutor
from ellm.worker.executor.memory import PeakMemory
from ellm.worker.model.begun import StepOutput
from ellm.worker.model.runner import ModelRunner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, "llama", dtype=torch.bfloat16)
    return folder


@pytest.fixture
def config(folder: Path) -> WorkerConfig:
    return WorkerConfig(
        model=ModelConfig(path=str(folder), device="cpu", jit=False, deterministic=False),
        cache=CacheConfig(num_blocks=40),
        scheduler=SchedulerConfig(max_num_seqs=4, max_step_tokens=64),
        num_threads=1,
    )


def test_auto_on_a_cpu_is_float32_and_the_checkpoints_context(config: WorkerConfig) -> None:
    told: list[str] = []
    executor = LocalExecutor.load(config, lambda what, _: told.append(what))
    assert (executor.device, executor.dtype, executor.deterministic) == ("cpu", "float32", False)
    limits = executor.limits
    assert (limits.num_blocks, limits.block_size, limits.max_model_len) == (40, 16, 512)
    assert (limits.vocab_size, limits.eos_token_ids) == (320, (257,))
    memory = dict(limits.memory)
    assert memory["KV block"] == 2 * 2 * 2 * 8 * 16 * 4  # k and v, layers, heads, dim, tokens, bytes
    assert memory["KV pool"] == 40 * memory["KV block"] == executor.runner.cache.num_bytes
    assert memory["weights"] > 4 * 2 * 320 * 48
    assert list(dict.fromkeys(told)) == ["loading weights", "warming up", "finishing"]
    assert executor.runner.num_resident == 0


@pytest.mark.needs_module("numba")
def test_strict_is_on_where_it_can_be(config: WorkerConfig) -> None:
    model = replace(config.model, jit=None, deterministic=None, dtype="bfloat16")
    executor = LocalExecutor.load(replace(config, model=model))
    assert executor.deterministic
    assert executor.dtype == "bfloat16"


def test_a_small_pool_shortens_the_context_and_says_so(
    config: WorkerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        executor = LocalExecutor.load(replace(config, cache=CacheConfig(num_blocks=5)))
    assert executor.limits.max_model_len == 80
    assert "max_model_len is 80, not 512" in caplog.text


@pytest.mark.parametrize(
    ("model", "cache", "message"),
    [
        ({"max_model_len": 513}, {}, "max_model_len = 513: this checkpoint allows 2 to 512"),
        ({"max_model_len": 1}, {}, "max_model_len = 1"),
        ({"max_model_len": 400}, {"num_blocks": 5}, "holds 80 tokens"),
        ({"dtype": "float16"}, {}, "float16 is not supported on a CPU"),
        ({"deterministic": True}, {}, "deterministic=True cannot be had"),
        ({"path": "/nowhere"}, {}, "there is no folder /nowhere"),
    ],
)
def test_what_cannot_work_is_refused(
    config: WorkerConfig, model: dict[str, object], cache: dict[str, int], message: str
) -> None:
    changed = replace(
        config,
        model=replace(config.model, **model),  # type: ignore[arg-type]
        cache=replace(config.cache, **cache),  # type: ignore[arg-type]
    )
    with pytest.raises(ConfigError, match=message):
        LocalExecutor.load(changed)


def test_a_gpu_that_is_not_there(config: WorkerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device cuda was asked for"):
        LocalExecutor.load(replace(config, model=replace(config.model, device="cuda")))


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    config: WorkerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ellm.worker.executor.rank.available_bytes", lambda device: 1000)
    told: list[str] = []
    with pytest.raises(ConfigError, match=r"the weights take \d+ MiB and 0 MiB are free on cpu; a smaller"):
        LocalExecutor.load(config, lambda what, _: told.append(what))
    assert not told


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("ellm.worker.model.loader.WeightReader.read", "while the weights are loaded: a smaller dtype"),
        ("ellm.worker.model.runner.ModelRunner.execute", "while the largest step runs: lower scheduler.max"),
    ],
)
def test_a_full_device_is_said_in_words(
    config: WorkerConfig, monkeypatch: pytest.MonkeyPatch, target: str, message: str
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(target, full)
    with pytest.raises(ConfigError, match=message) as caught:
        LocalExecutor.load(config)
    assert str(caught.value).endswith("(CUDA out of memory. Tried to allocate 2 GiB.)")


def test_the_largest_step_has_run_in_every_way_before_anybody_is_served(
    config: WorkerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[int, str | None]] = []
    execute = ModelRunner.execute

    def watched(runner: ModelRunner, plan: BatchPlan) -> StepOutput:
        ran.append((plan.num_rows, plan.way))
        return execute(runner, plan)

    monkeypatch.setattr(ModelRunner, "execute", watched)
    cache = replace(config.cache, transient_blocks=2)
    executor = LocalExecutor.load(replace(config, cache=cache, recompute_ahead="auto"))
    assert executor.limits.hole_ways == ("apart", "ahead")
    assert [one for one in ran if one[0] == 64] == [(64, None), (64, "apart"), (64, "ahead")]
    assert max(rows for rows, _ in ran) == config.scheduler.max_step_tokens


def test_every_thread_that_executes_takes_the_configured_threads(config: WorkerConfig) -> None:
    """OpenMP's setting belongs to a thread; an engine loop runs in one of its own."""
    executor = LocalExecutor.load(replace(config, num_threads=2))
    torch.set_num_threads(1)
    seen: list[int] = []

    def work() -> None:
        driver = PlanDriver(executor)
        driver.add(1, [1, 2, 3])
        driver.generate(1, 3)
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.set_num_threads(1)
    assert seen == [2]


def test_closing_frees_weights_and_pool(config: WorkerConfig) -> None:
    executor = LocalExecutor.load(config)
    pool = weakref.ref(executor.runner.cache)
    executor.close()
    gc.collect()
    assert pool() is None


def test_prompt_scores_come_chunk_by_chunk(config: WorkerConfig) -> None:
    """One for each prompt token but the first, none for tokens that are not the prompt's."""
    executor = LocalExecutor.load(config)
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=2, logprobs=0)
    whole, parts = PlanDriver(executor), PlanDriver(executor)
    prompt = list(range(40))
    whole.add(1, prompt, sampling)
    whole.generate(1, 2)
    track = parts.add(2, prompt, sampling, outputs=[7, 8, 9])
    parts.generate(2, 4, chunk=13)
    want = whole.tracks[1].results[0].prompt_logprobs
    assert want is not None
    assert len(want[1]) == 39
    assert all(len(score.top) == 2 for score in want[1])
    got = [s for r in track.results for s in (r.prompt_logprobs or {}).get(2, ())]
    assert [s.logprob for s in got] == pytest.approx([s.logprob for s in want[1]], abs=1e-5)
    assert [s.rank for s in got] == [s.rank for s in want[1]]


def test_many_sequences_come_and_go(config: WorkerConfig) -> None:
    """More residents than rows at first, each with tokens that only the executor knows."""
    executor = LocalExecutor.load(replace(config, cache=CacheConfig(num_blocks=400)))
    lone, crowd = PlanDriver(executor), PlanDriver(executor, feed_back=False)
    for seq_id in range(150):
        crowd.add(seq_id, [seq_id, 3, 5])
        crowd.step({seq_id: 3})
    for _ in range(4):
        crowd.step({seq_id: 1 for seq_id in range(150)})
    outputs = {seq_id: crowd.tracks[seq_id].outputs for seq_id in range(150)}
    for seq_id in range(150):
        crowd.release(seq_id)
    crowd.add(1000, [1])
    crowd.step({1000: 1})
    assert executor.runner.num_resident == 1
    for seq_id in (0, 63, 64, 149):
        lone.add(2000 + seq_id, [seq_id, 3, 5])
        assert lone.generate(2000 + seq_id, 5) == outputs[seq_id]


@pytest.fixture
def megabytes() -> Callable[[int], torch.Tensor]:
    return lambda n: torch.ones(n << 20, dtype=torch.uint8)


def test_peak_memory_sees_what_was_freed_again(megabytes: Callable[[int], torch.Tensor]) -> None:
    peak = PeakMemory(torch.device("cpu"))
    block = megabytes(64)
    del block
    assert 60 << 20 < peak.read() < 100 << 20
