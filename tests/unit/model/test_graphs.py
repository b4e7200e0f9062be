"""Recorded decode steps: which sizes there are, which steps are none of them, and what happens without."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ellm.kernels.ops import AttentionMeta, HeadTransform
from ellm.kernels.reference import TorchOps
from ellm.worker.model.computation import Alone, AttentionCall
from ellm.worker.model.graphs import DecodeGraphs, DecodeSizes, Replay, graph_problem

CPU = torch.device("cpu")
NOTHING = HeadTransform(None, None, 0.0, None)


def test_sizes_are_powers_of_two_and_the_limits() -> None:
    assert DecodeSizes.up_to(6, 1500) == DecodeSizes((1, 2, 4, 6), (512, 1024, 1500))
    assert DecodeSizes.up_to(8, 1024) == DecodeSizes((1, 2, 4, 8), (512, 1024))
    assert DecodeSizes.up_to(1, 100) == DecodeSizes((1,), (512,))


def test_what_stands_in_the_way_is_named() -> None:
    cuda, triton = torch.device("cuda"), SimpleNamespace(name="triton")
    assert graph_problem(triton, cuda, 1) is None  # type: ignore[arg-type]
    assert "need a GPU" in str(graph_problem(triton, CPU, 1))  # type: ignore[arg-type]
    assert "need the Triton kernels" in str(graph_problem(TorchOps(), cuda, 1))
    assert "several ranks" in str(graph_problem(triton, cuda, 2))  # type: ignore[arg-type]


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


def test_steps_take_the_smallest_graph_with_room_and_leave_nothing_behind() -> None:
    recorder = Recorder()
    made = graphs(recorder)
    for ids in ([3, 5, 7], [1], [2, 4, 6, 8], [9, 9, 1]):
        hidden = made.hidden(*step(ids))
        assert hidden is not None
        assert hidden[:, 0].tolist() == [2.0 * i for i in ids]
    assert (made.num_graphs, recorder.num_recorded, made.num_replays) == (2, 2, 4)
    chosen = made.hidden(*step([3, 5, 7], rows=torch.tensor([2])))
    assert chosen is not None
    assert chosen[:, 0].tolist() == [14.0]
    made.record_all()
    assert made.num_graphs == 3 * 2


@pytest.mark.parametrize(
    "other",
    [{"num_recompute": 1}, {"streams": (1,)}, {"num_rows": 9}, {"max_kv_len": 601}],
)
def test_other_steps_run_as_they_always_did(other: dict[str, Any]) -> None:
    recorder = Recorder()
    assert graphs(recorder).hidden(*step([1, 2], **other)) is None
    assert graphs(recorder).hidden(*step([1] * 5)) is None
    assert recorder.num_recorded == 0


def test_what_cannot_be_recorded_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(RuntimeError("operation not permitted when stream is capturing\nmore"))
    made = graphs(recorder)
    with caplog.at_level(logging.WARNING):
        assert [made.hidden(*step([1])) for _ in range(3)] == [None] * 3
    (message,) = (r.getMessage() for r in caplog.records)
    assert message.endswith("steps run without: operation not permitted when stream is capturing")
    assert recorder.num_recorded == 1
    with pytest.raises(torch.OutOfMemoryError):
        graphs(Recorder(torch.OutOfMemoryError("CUDA out of memory"))).hidden(*step([1]))


def test_a_kernel_that_torch_stands_in_for_is_never_replayed() -> None:
    """torch's store knows nothing of rows without a slot."""
    ops = SimpleNamespace(broken=frozenset({"kv_store"}))
    recorder = Recorder()
    assert graphs(recorder, ops).hidden(*step([1])) is None
    assert recorder.num_recorded == 0
