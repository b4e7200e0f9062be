"""Recorded decode steps: which sizes there are, which steps are none of them, and what happens without."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ellm.kernels.ops import AttentionMeta, HeadTransform
from ellm.kernels.reference import TorchOps
from ellm.worker.model.computation import Alone, AttentionCall
from ellm.worker.model.graphs import (
    CudaRecorder,
    DecodeGraphs,
    DecodeSizes,
    NotRecorded,
    RanksRecorder,
    Replay,
    graph_problem,
)

CPU = torch.device("cpu")
NOTHING = HeadTransform(None, None, 0.0, None)


def test_sizes_are_powers_of_two_and_the_limits() -> None:
    assert DecodeSizes.up_to(6, 1500) == DecodeSizes((1, 2, 4, 6), (512, 1024, 1500))
    assert DecodeSizes.up_to(8, 1024) == DecodeSizes((1, 2, 4, 8), (512, 1024))
    assert DecodeSizes.up_to(1, 100) == DecodeSizes((1,), (512,))


def test_what_stands_in_the_way_is_named() -> None:
    cuda, triton = torch.device("cuda"), SimpleNamespace(name="triton")
    assert graph_problem(triton, cuda) is None  # type: ignore[arg-type]
    assert "need a GPU" in str(graph_problem(triton, CPU))  # type: ignore[arg-type]
    assert "need the Triton kernels" in str(graph_problem(TorchOps(), cuda))


class Recorder:
    """Fails where told to; a replay fills the result with the number of tokens in the fixed inputs."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.num_recorded = 0

    def warm(self, call: Callable[[], object]) -> None:
        raise AssertionError("whole steps alone")

    capture = warm  # type: ignore[assignment]

    def record(self, call: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        self.num_recorded += 1
        if self.error is not None:
            raise self.error
        out = call().clone()

        def replay() -> None:
            out.copy_(call())

        return replay, out

    def agree(self, problem: str | None) -> None:
        if problem is not None:
            raise NotRecorded(problem)


class Doubling:
    """A model of one layer whose hidden states are twice the token ids."""

    def forward(self, token_ids: Tensor, positions: Tensor, rows: None) -> Any:
        del positions, rows
        heads = token_ids.view(-1, 1, 1)
        return 2.0 * (yield AttentionCall(heads, heads, heads, NOTHING, 1.0, None)).view(-1, 1)


class SeesNothing(TorchOps):
    """Attention that gives back its query; rows that are not there must have nothing."""

    def rotary_store(self, q: Tensor, k: Tensor, v: Tensor, meta: AttentionMeta, *_: Any) -> Tensor:
        absent = meta.slot_mapping < 0
        assert torch.equal(absent, meta.kv_lens == 0)
        assert not q[absent].any()
        return q

    def paged_attention(self, q: Tensor, *_: Any) -> Tensor:
        return q


def graphs(recorder: Recorder, ops: Any = None) -> DecodeGraphs:
    cache: Any = SimpleNamespace(device=CPU, block_size=16, layers=[(None, None)])
    model: Any = Doubling()
    sizes = DecodeSizes.up_to(4, 600)
    return DecodeGraphs(model, ops or SeesNothing(), cache, sizes, Alone(), recorder)


def step(ids: list[int], **fields: Any) -> tuple[Any, Any]:
    """A plan and its inputs: one decode row for each id."""
    count = len(ids)
    meta = {
        "num_decode": count,
        "num_recompute": 0,
        "max_kv_len": 40,
        "positions": torch.full((count,), 39),
        "slot_mapping": torch.arange(count),
        "kv_lens": torch.full((count,), 40, dtype=torch.int32),
        "block_tables": torch.ones((count, 3), dtype=torch.int32),
    }
    rows = fields.pop("rows", None)
    plan = SimpleNamespace(streams=fields.pop("streams", ()), num_rows=fields.pop("num_rows", count))
    inputs = SimpleNamespace(meta=SimpleNamespace(**(meta | fields)), token_ids=torch.tensor(ids), rows=rows)
    return plan, inputs


@torch.inference_mode()
def test_steps_take_the_smallest_graph_with_room_and_leave_nothing_behind() -> None:
    recorder = Recorder()
    made = graphs(recorder)
    assert made.hidden(*step([1])) is None, "nothing is recorded while requests are served"
    made.record_largest(1)
    made.record_all()
    assert made.num_graphs == recorder.num_recorded == 3 * 2
    for ids in ([3, 5, 7], [1], [2, 4, 6, 8], [9, 9, 1]):
        hidden = made.hidden(*step(ids))
        assert hidden is not None
        assert hidden[:, 0].tolist() == [2.0 * i for i in ids]
    assert (recorder.num_recorded, made.num_replays) == (6, 4)
    chosen = made.hidden(*step([3, 5, 7], rows=torch.tensor([2])))
    assert chosen is not None
    assert chosen[:, 0].tolist() == [14.0]


@pytest.mark.parametrize(
    "other",
    [{"num_recompute": 1}, {"streams": (1,)}, {"num_rows": 9}, {"max_kv_len": 601}],
)
def test_other_steps_run_as_they_always_did(other: dict[str, Any]) -> None:
    made = graphs(Recorder())
    made.record_all()
    assert made.hidden(*step([1, 2], **other)) is None
    assert made.hidden(*step([1] * 5)) is None
    assert made.num_replays == 0


def test_what_cannot_be_recorded_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    made = graphs(recorder)
    made.record_largest(2)
    recorder.error = NotRecorded("operation not permitted when stream is capturing")
    with caplog.at_level(logging.WARNING):
        made.record_all()
        made.record_all()
    (message,) = (r.getMessage() for r in caplog.records)
    assert message.endswith("steps run without: operation not permitted when stream is capturing")
    assert recorder.num_recorded == 3
    assert made.num_graphs == 0
    assert made.hidden(*step([1] * 4)) is None, "all steps run without"
    with pytest.raises(torch.OutOfMemoryError):
        graphs(Recorder(torch.OutOfMemoryError("CUDA out of memory"))).record_all()
    with pytest.raises(RuntimeError, match="illegal"):  # of the step itself: it would come again in service
        graphs(Recorder(RuntimeError("an illegal memory access"))).record_all()


class Breaking(SeesNothing):
    """A kernel that does not compile on its third call."""

    broken: frozenset[str] = frozenset()
    num_calls = 0

    def paged_attention(self, q: Tensor, *_: Any) -> Tensor:
        self.num_calls += 1
        if self.num_calls == 3:
            self.broken = frozenset({"kv_store"})
        return q


def test_a_kernel_that_torch_stands_in_for_is_never_replayed(caplog: pytest.LogCaptureFixture) -> None:
    """torch's store knows nothing of rows without a slot."""
    recorder = Recorder()
    made = graphs(recorder, SimpleNamespace(broken=frozenset({"kv_store"})))
    made.record_all()
    assert (made.num_graphs, recorder.num_recorded) == (0, 0)
    late = graphs(recorder, Breaking())
    late.record_all()
    assert (late.num_graphs, recorder.num_recorded) == (0, 3), "found out while it was recorded"
    assert caplog.text.count("stand in for kv_store") == 2


@pytest.mark.parametrize("problem", [RuntimeError("not while capturing\nmore"), NotRecorded("as it is")])
def test_what_a_device_does_not_capture_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    """With a capture that is none: it runs what it is given."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(pool=lambda: 1, replay=lambda: None))
    modes = []

    @contextmanager
    def graph(_: Any, pool: Any, capture_error_mode: str) -> Iterator[None]:
        modes.append((pool, capture_error_mode))
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    recorder = CudaRecorder(CPU)

    def fail() -> None:
        raise problem

    with pytest.raises(NotRecorded, match=r"^(not while capturing|as it is)$"):
        recorder.capture(fail)
    recorder.capture(lambda: None)
    recorder.capture(lambda: None)
    assert [pool for pool, _ in modes] == [None, None, 1], "all graphs share one pool of memory"
    full = torch.OutOfMemoryError("CUDA out of memory")
    problem = full
    with pytest.raises(torch.OutOfMemoryError):
        recorder.capture(fail)


@pytest.mark.parametrize("own", [None, NotRecorded("not here")])
def test_no_rank_replays_what_another_cannot_record(own: Exception | None) -> None:
    asked: list[bool] = []

    def agree(so: bool) -> bool:
        asked.append(so)
        return so and len(asked) < 5

    recorder = Recorder()
    made = graphs(RanksRecorder(recorder, agree))  # type: ignore[arg-type]
    made.record_largest(1)
    assert (made.num_graphs, asked) == (1, [True] * 3), "before, after, and as it was found"
    recorder.error = own
    made.record_all()
    assert made.num_graphs == 0
    assert asked[3:] == [True, own is None]
