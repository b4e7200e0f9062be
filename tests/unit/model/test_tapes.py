"""Taped decode steps: the tokens of steps that are not, which steps are, and models that cannot be."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import golden
from support.checkpoints import write_checkpoint
from support.engine_driver import play

from ellm.worker.api.config import SchedulerConfig
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.executor.local import LocalExecutor

pytestmark = pytest.mark.needs_module("numba")

SCHEDULER = SchedulerConfig(max_num_seqs=8, max_step_tokens=192)


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tapes")
    write_checkpoint(made, "llama")
    return made


def requests(count: int = 6) -> list[EngineRequest]:
    """They come to their end one after the other, so that steps have any number of rows."""
    return [
        EngineRequest(
            f"r{i}",
            tuple(golden.prompt(5 + 9 * i, seed=i)),
            SamplingParams(
                temperature=0.0 if i % 2 else 0.9, seed=3, max_tokens=6 + 5 * i, ignore_eos=True, logprobs=0
            ),
        )
        for i in range(count)
    ]


def played(executor: LocalExecutor) -> tuple[dict[str, list[int]], int]:
    driver = play(executor, requests(), SCHEDULER)
    return driver.streams, executor.runner.num_replays[0]


def tapes_of(executor: LocalExecutor) -> object:
    return executor.runner._graphs


@pytest.mark.parametrize(
    ("family", "dtype", "threads"),
    [("llama", "float32", 1), ("llama", "bfloat16", 2), ("qwen3", "float32", 2), ("qwen3", "bfloat16", 1)],
)
def test_tokens_are_those_of_steps_that_are_not_taped(
    tmp_path: Path, family: str, dtype: str, threads: int
) -> None:
    write_checkpoint(tmp_path, family)
    results = []
    for taped in (True, False):
        config = golden.config(tmp_path, jit=True, dtype=dtype, decode_tapes=taped)
        executor = LocalExecutor.load(config)
        executor._threads = threads
        first, replays = played(executor)
        again, more = played(executor)
        assert again == first
        assert (replays > 20) == taped
        assert (more - replays > replays) == taped, "the second time all have been recorded"
        results.append(first)
        executor.close()
    assert results[0] == results[1]


def test_tapes_are_made_again_for_another_number_of_threads(folder: Path) -> None:
    executor = golden.executor(folder, jit=True)
    first, _ = played(executor)
    before = executor.runner.num_replays[0]
    executor._threads, executor._thread_id = 2, -1
    again, after = played(executor)
    assert again == first
    assert after == 2 * before, "a step of each number of rows was recorded again, the others were played"
    executor.close()


def test_a_model_that_computes_between_kernels_runs_as_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, "opt")  # torch adds positions
    results = []
    with caplog.at_level(logging.INFO, logger="ellm.worker.model.tapes"):
        for taped in (True, False):
            executor = LocalExecutor.load(golden.config(tmp_path, jit=True, decode_tapes=taped))
            tokens, replays = played(executor)
            assert replays == 0
            results.append(tokens)
            executor.close()
    assert results[0] == results[1]
    (message,) = (r.getMessage() for r in caplog.records)
    assert message.startswith("decode steps run kernel by kernel: aten.")


def test_the_torch_body_has_none(folder: Path) -> None:
    executor = golden.executor(folder, jit=False)
    assert tapes_of(executor) is None
    executor.close()
