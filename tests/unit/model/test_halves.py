"""A step in two halves computes what it computes in one."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from support import golden
from support.checkpoints import write_checkpoint
from support.engine_driver import EngineDriver, plain
from support.random_residency import RandomResidency

from ellm.kernels.dispatch import has_numba
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.engine.plan import PlanEntry
from ellm.worker.model.computation import Alone, AttentionCall, Computation, PendingSum, run_halves
from ellm.worker.model.halves import place_rows, split


def entry(seq_id: int, rows: int, *, recompute: bool = False) -> PlanEntry:
    return PlanEntry(seq_id, 0, rows, (0,) * rows, [], not recompute, recompute=recompute)


def test_all_rows_of_a_sequence_stay_together() -> None:
    entries = [entry(1, 1), entry(2, 1), entry(3, 30), entry(1, 16, recompute=True)]
    sides = split(entries)
    assert sides is not None
    assert sides[0] == sides[3]
    rows = np.bincount(sides, [1, 1, 30, 16])
    assert sorted(rows) == [18, 30]


def test_what_cannot_be_halved_is_not() -> None:
    assert split([entry(1, 64)]) is None
    assert split([entry(1, 64), entry(2, 8)]) is None
    assert split([entry(1, 1), entry(1, 64, recompute=True)]) is None
    assert split([entry(i, 1) for i in range(2)]) is not None


@pytest.mark.parametrize("seed", range(20))
def test_rows_come_back_in_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.random(30)
    row_sides = rng.integers(0, 2, 30)
    selected = np.sort(rng.choice(30, rng.integers(1, 30), replace=False)) if seed % 4 else None
    placed, order = place_rows(row_sides, selected)
    outputs = [values[rows] if within is None else values[rows][within] for rows, within in placed]
    wanted = values if selected is None else values[selected]
    assert np.array_equal(np.concatenate(outputs)[order], wanted)
    assert all(len(out) for out in outputs)


def test_a_half_without_logits_has_a_row_nobody_reads() -> None:
    placed, order = place_rows(np.array([0, 0, 1, 1]), np.array([3]))
    assert placed[0][1] is not None
    assert placed[0][1].tolist() == [0]
    assert order.tolist() == [1]


class Recorder(Alone):
    """Says in which order sums are begun and waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def begin_sum(self, part: torch.Tensor) -> PendingSum:
        name = str(int(part))
        self.log.append(f"begin {name}")
        pending = super().begin_sum(part)
        log = self.log

        class Logged:
            def wait(self) -> torch.Tensor:
                log.append(f"wait {name}")
                return pending.wait()

        return Logged()


def no_attention(call: AttentionCall) -> torch.Tensor:
    raise AssertionError("nobody has asked")


def test_one_half_computes_while_the_others_sum_is_made() -> None:
    def half(first: int) -> Computation:
        total = torch.tensor(0)
        for i in range(3):
            total = total + (yield torch.tensor(first + i))
        return total

    recorder = Recorder()
    first, second = run_halves((half(10), half(20)), recorder, (no_attention, no_attention))
    assert (int(first), int(second)) == (33, 63)
    assert recorder.log[:6] == ["begin 10", "begin 20", "wait 10", "begin 11", "wait 20", "begin 21"]
    assert len(recorder.log) == 12


@pytest.mark.parametrize("family", ["llama", pytest.param("opt", marks=pytest.mark.slow)])
def test_halves_change_nothing(tmp_path: Path, family: str) -> None:
    """With holes, streams and copies at random: tokens, and under STRICT scores, of undivided steps."""
    write_checkpoint(tmp_path, family, num_hidden_layers=3)
    drivers = []
    for overlap_rows in (None, 1):
        executor = golden.executor(
            tmp_path, jit=has_numba(), num_blocks=10, transient_blocks=20, host_bytes=1 << 20
        )
        executor.runner._overlap_rows = overlap_rows
        driver = EngineDriver(
            executor.limits, scheduler=plain(max_num_seqs=8, max_step_tokens=96), policy=RandomResidency(3)
        )
        driver.executor = executor  # type: ignore[assignment]
        rng = Random(5)
        for i in range(6):
            sampling = SamplingParams(
                temperature=(0.0, 0.8)[i % 2],
                max_tokens=30,
                ignore_eos=True,
                logprobs=0,
                prompt_logprobs=1 if i == 4 else None,
            )
            ids = golden.prompt(rng.randint(5, 60), i)
            driver.add(EngineRequest(f"r{i}", tuple(ids), sampling))
            driver.turn()
        driver.run(max_turns=20_000)
        executor.close()
        drivers.append(driver)
    whole, halved = drivers
    assert halved.streams == whole.streams
    assert any(split(plan.entries) is not None for plan in halved.plans if plan.entries)
    assert any(e.recompute for plan in halved.plans for e in plan.entries)
    assert any(plan.streams for plan in halved.plans)
    assert halved.outputs["r4"][0].prompt_logprobs is not None
    if executor.deterministic:
        for name in whole.outputs:
            assert halved.outputs[name][-1].logprobs == whole.outputs[name][-1].logprobs
