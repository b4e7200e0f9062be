"""Launches that are recorded and played: the same bits on other inputs, memory that nobody else has, and what
cannot be played found out."""

from __future__ import annotations

import gc

import pytest
import torch
from support.paged_batch import Heads, PagedSequences, same_bits
from torch import Tensor

from ellm.kernels.dispatch import select
from ellm.kernels.ops import HeadTransform, Ops
from ellm.kernels.recording import Arena, Recording, current

pytestmark = pytest.mark.needs_module("numba")

WIDTH = 128
HEADS = Heads(num_heads=4, num_kv_heads=2, dim=32)
NOTHING = HeadTransform(None, None, 0.0, None)


@pytest.fixture(scope="module")
def ops() -> Ops:
    return select("cpu", jit=True)


class Layers:
    """What a decoder does to x [R, WIDTH]."""

    def __init__(self, ops: Ops, count: int = 3) -> None:
        generator = torch.Generator().manual_seed(1)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator) / size[-1] ** 0.5

        self._ops = ops
        self._norm = 1 + draw(WIDTH)
        self._layers = [(ops.linear(draw(256, WIDTH), None), ops.linear(draw(WIDTH, 128), None))] * count

    def __call__(self, x: Tensor) -> Tensor:
        residual: Tensor | None = None
        for up, down in self._layers:
            normed, residual = self._ops.rms_norm(x, self._norm, 1e-5, residual)
            x = down(self._ops.silu_mul(up(normed)))
        return self._ops.rms_norm(x, self._norm, 1e-5, residual)[0]


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_playing_is_computing(ops: Ops, rows: int, threads: int) -> None:
    from ellm.kernels.tape import Tape

    layers, x = Layers(ops), torch.randn(rows, WIDTH)
    expected = layers(x.clone())
    with torch.inference_mode():
        recording = Recording(Arena())
        with recording:
            assert current() is recording
            first = layers(x)
        assert current() is None
        assert recording.problem is None
        assert same_bits(first, expected)
        tape = Tape(recording)
        for seed in range(3):
            other = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))
            expected = layers(other.clone())
            x.copy_(other)
            gc.collect()
            strangers = [
                torch.full((rows, WIDTH), float("nan")) for _ in range(50)
            ]  # would meet freed memory
            tape.play()
            assert same_bits(first, expected)
            assert all(s.isnan().all() for s in strangers)
    assert tape.num_threads == threads


def test_layers_share_memory(ops: Ops) -> None:
    made = []
    for count in (2, 4, 40):
        arena = Arena()
        layers, x = Layers(ops, count), torch.randn(7, WIDTH)
        with Recording(arena):
            layers(x)
        made.append(arena.num_bytes)
    assert made[0] > 0
    assert made[1] == made[2]


def test_what_is_still_held_is_not_given_again() -> None:
    arena = Arena()
    first = arena.take(5000)
    view = first.view(torch.float32)[10:]
    del first
    gc.collect()
    second = arena.take(5000)
    assert second.data_ptr() != view.data_ptr() - 40
    assert second.data_ptr() % 64 == 0
    address = second.data_ptr()
    del second
    assert arena.take(6000).data_ptr() == address
    assert arena.num_bytes == 2 * 8192


def sequences_of(step: int) -> tuple[PagedSequences, list[tuple[int, int, int]]]:
    sequences = PagedSequences([40, 70, 33], HEADS, seed=step)
    return sequences, [(i, n - 1 - step, n - step) for i, n in enumerate(sequences.lengths)]


def test_attention_follows_positions_and_tables(ops: Ops) -> None:
    from ellm.kernels.tape import Tape

    sequences, entries = sequences_of(0)
    q, meta = sequences.step(entries)
    k = torch.cat([sequences.k[i][start:end] for i, start, end in entries])
    k_pool, v_pool = sequences.k_pool, sequences.v_pool
    recording = Recording(Arena())
    with recording:
        ops.rotary_store(q, k, k, meta, (k_pool, v_pool), NOTHING)
        out = ops.paged_attention(q, k_pool, v_pool, meta, 0.2)
    assert recording.problem is None
    tape = Tape(recording)
    for step in (3, 9):
        other, entries = sequences_of(step)
        other_q, other_meta = other.step(entries)
        other_k = torch.cat([other.k[i][start:end] for i, start, end in entries])
        k_pool.copy_(other.k_pool)
        v_pool.copy_(other.v_pool)
        ops.rotary_store(other_q, other_k, other_k, other_meta, (other.k_pool, other.v_pool), NOTHING)
        expected = ops.paged_attention(other_q, other.k_pool, other.v_pool, other_meta, 0.2)
        q.copy_(other_q)
        k.copy_(other_k)
        for name in ("block_tables", "positions", "slot_mapping"):
            getattr(meta, name).copy_(getattr(other_meta, name))
        tape.play()
        assert same_bits(out, expected)
        assert torch.equal(k_pool, other.k_pool)


@pytest.mark.parametrize(
    ("name", "value"), [("block_tables", 1000), ("slot_mapping", -1), ("positions", 200)]
)
def test_an_id_that_leads_out_of_the_pool_is_found_before_each_play(ops: Ops, name: str, value: int) -> None:
    from ellm.kernels.tape import Tape

    sequences, entries = sequences_of(0)
    q, meta = sequences.step(entries)
    k = torch.zeros(3, 2, 32)
    rotation = HeadTransform(None, None, 0.0, torch.ones(200, 2, 16))
    recording = Recording(Arena())
    with recording:
        ops.rotary_store(q, k, k, meta, (sequences.k_pool, sequences.v_pool), rotation)
        ops.paged_attention(q, sequences.k_pool, sequences.v_pool, meta, 0.2)
    tape = Tape(recording)
    tape.play()
    k.fill_(7.0)
    before = sequences.k_pool.clone()
    getattr(meta, name)[1] = value
    with pytest.raises(AssertionError):
        tape.play()
    assert torch.equal(sequences.k_pool, before)


@pytest.mark.parametrize(
    "strange",
    [
        lambda x: x + 1,
        lambda x: x.add_(1),
        lambda x: torch.zeros(3),
        lambda x: torch.tensor([1.0]),
        lambda x: x.t().contiguous(),
        lambda x: x.index_select(0, torch.tensor([0])),
        lambda x: x if x.max().item() > 0 else -x,
        lambda x: torch.empty(3, device="meta"),
        lambda x: x.bfloat16(),
    ],
)
def test_what_torch_computes_is_found_out(ops: Ops, strange: object) -> None:
    x, weight = torch.randn(4, WIDTH), torch.ones(WIDTH)
    for mode in (torch.inference_mode, torch.no_grad):
        recording = Recording(Arena())
        with mode(), recording:
            normed, _ = ops.rms_norm(x, weight, 1e-5)
            assert recording.problem is None
            strange(normed)  # type: ignore[operator]
        assert recording.problem is not None


def test_views_are_no_computing(ops: Ops) -> None:
    recording = Recording(Arena())
    with torch.inference_mode(), recording:
        normed, _ = ops.rms_norm(torch.empty(4, WIDTH), torch.empty(WIDTH), 1e-5)
        q, _, _ = normed.view(4, 4, 32).split_with_sizes([2, 1, 1], 1)
        q[1:].unsqueeze(0).transpose(1, 2)
    assert recording.problem is None


def test_an_error_ends_a_recording(ops: Ops) -> None:
    with pytest.raises(AssertionError), Recording(Arena()):
        ops.rms_norm(torch.ones(4, WIDTH), torch.ones(WIDTH + 1), 1e-5)
    assert current() is None
