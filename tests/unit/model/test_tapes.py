"""Taped decode steps: the tokens and scores of steps that are not, and models that cannot be taped."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
Spoken = dict[str, list[tuple[Any, Any]]]  # tokens, and their scores to the last bit


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def requests() -> list[EngineRequest]:
    """They come to their end one after the other, so that steps have any number of rows."""
    params = [
        SamplingParams(temperature=0.9 * (i % 2), seed=3, max_tokens=6 + 5 * i, ignore_eos=True, logprobs=2)
        for i in range(6)
    ]
    return [EngineRequest(f"r{i}", tuple(golden.prompt(5 + 9 * i, seed=i)), p) for i, p in enumerate(params)]


def played(executor: LocalExecutor) -> tuple[Spoken, int]:
    """What was spoken, and the steps that were replayed so far."""
    driver = play(executor, requests(), SCHEDULER)
    assert set(driver.reasons.values()) == {"length"}
    spoken = {name: [(o.token_ids, o.logprobs) for o in outputs] for name, outputs in driver.outputs.items()}
    assert all(scores for outputs in spoken.values() for _, scores in outputs)
    return spoken, executor.runner.num_replays[0]


def has_kernels(dtype: str) -> bool:
    """Whether linear layers of this type are kernels here, and not a library's."""
    from ellm.kernels.numba_linear import suits_processor

    return suits_processor(getattr(torch, dtype))


@pytest.mark.parametrize(
    ("case", "dtype", "threads", "num_blocks"),
    [
        ("llama", "float32", 1, 128),
        ("llama", "float32", 2, 12),  # some are preempted and computed again
        ("mistral-window", "bfloat16", 2, 128),
        ("qwen3-window", "float32", 2, 128),
        ("qwen3", "bfloat16", 1, 12),
    ],
)
def test_tokens_and_scores_are_those_of_steps_that_are_not_taped(
    tmp_path: Path, case: str, dtype: str, threads: int, num_blocks: int
) -> None:
    family, overrides = golden.CASES[case]
    write_checkpoint(tmp_path, family, **overrides)
    results = []
    for taped in (True, False):
        settings = {"dtype": dtype, "num_blocks": num_blocks, "decode_tapes": taped}
        executor = golden.executor(tmp_path, jit=True, **settings)
        executor._threads = threads
        first, replays = played(executor)
        again, more = played(executor)
        assert again == first
        assert (replays > 20) == (taped and has_kernels(dtype))
        assert (more - replays > replays) == (replays > 0), "the second time all have been recorded"
        results.append(first)
        executor.close()
    assert results[0] == results[1]


def test_tapes_are_made_again_for_another_number_of_threads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    executor = golden.executor(tmp_path, jit=True)
    first, before = played(executor)
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
            executor = golden.executor(tmp_path, jit=True, decode_tapes=taped)
            spoken, replays = played(executor)
            assert replays == 0
            results.append(spoken)
            executor.close()
    assert results[0] == results[1]
    (message,) = (r.getMessage() for r in caplog.records)
    assert message.startswith("decode steps run kernel by kernel: ")


def test_the_torch_body_has_none(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    executor = golden.executor(tmp_path, jit=False)
    assert played(executor)[1] == 0
    executor.close()


def test_a_step_is_checked_once_and_not_in_each_layer(tmp_path: Path) -> None:
    from ellm.worker.model.tapes import DecodeTapes

    write_checkpoint(tmp_path, "llama", num_hidden_layers=3)
    executor = golden.executor(tmp_path, jit=True)
    played(executor)
    tapes = executor.runner._graphs
    assert isinstance(tapes, DecodeTapes)
    assert tapes.num_tapes > 3
    assert {len(tape._checks) for tape, _ in tapes._tapes.values()} == {3}  # positions, slots, tables
    executor.close()
