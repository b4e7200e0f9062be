"""Mixed steps in recorded pieces say what they say whole; what has no chain runs as it always did."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support import golden
from support.checkpoints import write_checkpoint
from support.holes import Hole, HoleDriver
from support.plans import GREEDY
from support.replays import CallAgain

from ellm.worker.executor.local import LocalExecutor
from ellm.worker.model.computation import Alone
from ellm.worker.model.graphs import NotRecorded
from ellm.worker.model.pieces import PieceGraphs, piece_rows

LAYERS = 3


def test_chains_are_close_where_rows_cost() -> None:
    assert piece_rows(512) == (16, 32, 64, 128, 256, 384, 512)
    assert piece_rows(200) == (16, 32, 64, 128, 200)
    assert piece_rows(20) == (16, 20)
    assert piece_rows(0) == ()


def pieces_of(executor: LocalExecutor, rows: tuple[int, ...], recorder: CallAgain) -> PieceGraphs:
    runner = executor.runner
    return PieceGraphs(runner._model, LAYERS, rows, torch.device("cpu"), Alone(), recorder)


def said(folder: Path, rows: tuple[int, ...] | None, recorder: CallAgain | None = None) -> Any:
    """Tokens of sequences in steps of every kind, with a hole that is recomputed and streamed; replays."""
    executor = golden.executor(folder, jit=False, num_blocks=24, transient_blocks=4, host_bytes=1 << 19)
    recorder, pieces = recorder or CallAgain(), None
    if rows is not None:
        pieces = pieces_of(executor, rows, recorder)
        pieces.record_all()
        executor.runner.replay_pieces(pieces)
    driver = HoleDriver(executor)
    tracks = [driver.add(i, golden.prompt(length, i), GREEDY) for i, length in ((1, 70), (2, 20))]
    driver.step({1: 41, 2: 20})
    driver.step({1: 29, 2: 1})
    driver.step({1: 1, 2: 1})
    saves = driver.save(tracks[0].block_ids[3:4])
    driver.settle(driver.step({}, saves=saves), saves)
    holed = driver.punch(1, 101, Hole(1, 3, 4), [save.host_block for save in saves])
    for _ in range(6):
        driver.step({101: 1, 2: 1})
    executor.close()
    outputs = [list(holed.outputs), list(tracks[1].outputs)]
    return outputs, 0 if pieces is None else pieces.num_replays


@pytest.mark.parametrize("family", ["llama", pytest.param("opt", marks=pytest.mark.slow)])
def test_every_kind_of_step_says_the_same_in_pieces(tmp_path: Path, family: str) -> None:
    write_checkpoint(tmp_path, family, num_hidden_layers=LAYERS)
    tokens, none = said(tmp_path, None)
    recorder = CallAgain()
    assert said(tmp_path, (16, 40, 64), recorder) == (tokens, 3 + 6)
    assert recorder.num_captured == 3 * (LAYERS + 1)
    assert none == 0
    # The first step has 61 rows.
    assert said(tmp_path, (16, 40)) == (tokens, 3 + 6 - 1), "a step without room runs whole"


def test_what_cannot_be_recorded_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path, "llama", num_hidden_layers=LAYERS)
    failing = CallAgain(NotRecorded("operation not permitted when stream is capturing"))
    with caplog.at_level(logging.WARNING):
        outputs, replays = said(tmp_path, (16, 64), failing)
    assert (outputs, replays) == (said(tmp_path, None)[0], 0)
    (message,) = (r.getMessage() for r in caplog.records if r.name.endswith("pieces"))
    assert message.endswith("mixed steps run without: operation not permitted when stream is capturing")
    full = CallAgain(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        said(tmp_path, (16,), full)


def test_rows_that_are_left_over_reach_nothing(tmp_path: Path) -> None:
    """Whatever lies in them."""
    write_checkpoint(tmp_path, "llama", num_hidden_layers=LAYERS)
    executor = golden.executor(tmp_path, jit=False)
    pieces = pieces_of(executor, (64,), CallAgain())
    pieces.record_all()
    executor.runner.replay_pieces(pieces)
    with torch.inference_mode():
        for kept in pieces._fixed._named.values():
            kept.fill_(torch.nan)
    driver = HoleDriver(executor)
    track = driver.add(1, golden.prompt(20, 1), GREEDY)
    driver.step({1: 20})
    driver.step({1: 1})
    assert pieces.num_replays == 2
    assert torch.isfinite(executor.runner.cache.resident).all()
    assert len(track.outputs) == 2
    executor.close()
