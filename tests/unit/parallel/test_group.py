"""Ranks find each other, agree, and end together, each with the reason."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.group_threads import QUICK, ranks, specs

from ellm.worker.api.errors import ConfigError
from ellm.worker.engine.plan import StepResult
from ellm.worker.parallel.communicator import SMALL_BYTES, GroupCommunicator, make_communicator
from ellm.worker.parallel.group import Group, GroupFailed, report_death
from ellm.worker.parallel.peers import GroupPeers

CPU = torch.device("cpu")


def test_messages_of_any_length_reach_all_ranks_in_order() -> None:
    sent = [b"", b"x", bytes(range(256)) * 63 + b"a" * 248, b"y" * (1 << 14), b"z" * 1_000_000]
    with ranks(3, lambda group: [group.receive() for _ in sent]) as (group, others):
        for message in sent:
            group.send(message)
        for other in others:
            assert other.result(10) == sent


def test_the_least_of_each_value_is_agreed_upon() -> None:
    with ranks(3, lambda g: g.agree_least((10 + g.rank, -g.rank, 1 << 60))) as (group, others):
        least = group.agree_least((11, 5, (1 << 60) + 1))
        assert least == [11, -2, 1 << 60]
        assert [other.result(10) for other in others] == [least, least]


def test_a_rank_tells_why_it_fails() -> None:
    def fail(group: Group) -> None:
        if group.rank == 2:
            group.fail(ConfigError("no such weights", param="model.path"))
        else:
            group.barrier()

    with ranks(3, fail) as (group, others):
        with pytest.raises(ConfigError, match="rank 2: no such weights") as caught:
            group.barrier()
        assert caught.value.param == "model.path"
        group.fail(caught.value)
        with pytest.raises(ConfigError, match="no such weights"):
            others[0].result(10)
        with pytest.raises(GroupFailed, match="the group has ended"):
            group.barrier()


def test_a_rank_that_fails_otherwise_ends_the_group_too() -> None:
    with (
        ranks(2, lambda group: group.fail(ValueError("out of memory"))) as (group, _),
        pytest.raises(GroupFailed, match="rank 1: out of memory"),
    ):
        group.barrier()


def test_a_rank_that_stands_still_is_not_waited_for() -> None:
    def stand_still(group: Group) -> str:
        group.ready()
        time.sleep(2.5)
        with pytest.raises(GroupFailed):
            group.receive()
        return "ended"

    with ranks(2, stand_still) as (group, others):
        group.ready()
        start = time.monotonic()
        with pytest.raises(GroupFailed, match="Timed out waiting 1000ms"):
            group.barrier()
        assert 0.5 < time.monotonic() - start < 5
        group.close()
        assert others[0].result(10) == "ended"


def test_a_follower_misses_rank_0() -> None:
    def wait(group: Group) -> None:
        group.ready()
        group.receive()

    with ranks(2, wait) as (group, others):
        group.ready()
        with pytest.raises(GroupFailed, match="rank 1 lost the group"):
            others[0].result(10)


class Hanging:
    """A device's step, which ends when it is let go."""

    feeds_back = False

    def __init__(self) -> None:
        self.end = threading.Event()

    @property
    def ended(self) -> bool:
        return self.end.is_set()

    def wait(self) -> None:
        self.end.wait(30)

    def result(self) -> StepResult:
        raise AssertionError("nobody gets that far")


def test_a_device_that_waits_for_a_rank_that_has_failed_is_left() -> None:
    """A device waits for the others' without an end: only their hosts can say that they are gone."""
    step = Hanging()
    quiet = replace(QUICK, step_s=30.0)
    with ranks(2, lambda group: group.fail(ValueError("out of memory")), quiet) as (group, _):
        with pytest.raises(GroupFailed, match="rank 1: out of memory"):
            group.wait_for_device(step)
        step.end.set()
        group.wait_for_device(step)


def test_a_device_that_hangs_is_not_waited_for() -> None:
    step = Hanging()
    with ranks(2, lambda group: None) as (group, _):
        with pytest.raises(GroupFailed, match=r"rank 0: its device has not ended a step within 1\.0 s"):
            group.wait_for_device(step)
        step.end.set()


def test_a_rank_that_never_comes_is_named() -> None:
    rendezvous, (spec, *_) = specs(3, replace(QUICK, start_s=0.3))
    with pytest.raises(GroupFailed, match=r"rank 1, 2 did not come within 0\.3 s"):
        Group.join(spec, rendezvous)


def test_a_death_before_all_have_come_is_reported() -> None:
    rendezvous, (spec, *_) = specs(2)
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(Group.join, spec, rendezvous)
        report_death(spec, 1, "killed by signal 9")
        with pytest.raises(GroupFailed, match="rank 1: killed by signal 9"):
            joining.result(10)


def test_nobody_is_told_where_nobody_listens() -> None:
    rendezvous, (spec, *_) = specs(2)
    gone = replace(spec, port=1)
    del rendezvous
    report_death(gone, 1, "whatever")


@pytest.mark.parametrize("rows", [3, SMALL_BYTES // 4 // 8 + 1])
@pytest.mark.parametrize("ordered", [True, False])
def test_sums_and_columns(ordered: bool, rows: int) -> None:
    def work(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        communicator = make_communicator(group, CPU, ordered=ordered)
        part = torch.arange(rows * 8.0).view(rows, 8) * (group.rank + 1)
        first = communicator.begin_sum(part.clone())
        second = communicator.begin_sum(part.to(torch.bfloat16) * 0 + group.rank)
        columns = communicator.join_columns(part[:2, :3])
        assert torch.equal(second.wait(), torch.full((rows, 8), 3.0, dtype=torch.bfloat16))
        return first.wait(), columns

    with ranks(3, work) as (group, others):
        results = [work(group), *(other.result(30) for other in others)]
    base = torch.arange(rows * 8.0).view(rows, 8)
    for total, columns in results:
        assert torch.equal(total, base * 6)
        assert torch.equal(columns, torch.cat([base[:2, :3] * factor for factor in (1, 2, 3)], dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_ranks_have_one_sum(dtype: torch.dtype) -> None:
    """However it is made: by exchange for a small message, by a ring for a large one."""
    row = (torch.randn(2, 512, generator=torch.Generator().manual_seed(2)) * 100).to(dtype)

    def sums(group: Group) -> list[torch.Tensor]:
        communicator = make_communicator(group, CPU, ordered=True)
        found = []
        for rows in (1, 7, SMALL_BYTES // 512):
            for at in {0, rows // 2, rows - 1}:
                part = torch.ones(rows, 512, dtype=dtype)
                part[at] = row[group.rank]
                found.append(communicator.begin_sum(part).wait()[at].clone())
        return found

    with ranks(2, sums) as (group, others):
        found = sums(group) + others[0].result(30)
    want = (row[0].float() + row[1].float()).to(dtype)
    assert all(torch.equal(one, want) for one in found)


@pytest.mark.parametrize("ordered", [True, False])
def test_strict_leaves_no_sum_of_a_gpu_to_the_library(ordered: bool) -> None:
    """Not of two ranks, either: how NCCL adds depends on a message's size. Asked for as on a GPU, with gloo
    in the place of NCCL."""

    def sums(group: Group) -> tuple[torch.Tensor, list[str]]:
        asked: list[str] = []

        class Backend:
            def __getattr__(self, name: str) -> object:
                asked.append(name)
                return getattr(group.gloo, name)

        communicator = GroupCommunicator(group, Backend, ordered=ordered, on_gpu=True)
        return communicator.begin_sum(torch.full((2, 8), 1.5 + group.rank)).wait(), asked

    with ranks(2, sums) as (group, others):
        for total, asked in (sums(group), others[0].result(30)):
            assert torch.equal(total, torch.full((2, 8), 4.0))
            assert asked == (["_allgather_base"] if ordered else ["allreduce"])


def test_an_ordered_sum_does_not_depend_on_a_rows_company() -> None:
    """Of three ranks and more; a ring's does (see the decision on tensor parallelism)."""
    row = torch.randn(4, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 4, 256)

    def sums(group: Group, ordered: bool) -> list[torch.Tensor]:
        communicator = make_communicator(group, CPU, ordered=ordered)
        found = []
        for rows in (1, 2, 3, 8, 33, 1000):
            for at in {0, rows // 2, rows - 1}:
                part = torch.ones(rows, 256)
                part[at] = row[group.rank]
                found.append(communicator.begin_sum(part).wait()[at].clone())
        return found

    with ranks(4, lambda group: sums(group, True)) as (group, others):
        found = sums(group, True)
        assert [len(other.result(30)) for other in others] == [len(found)] * 3
    want = ((row[0] + row[1]) + row[2]) + row[3]
    assert all(torch.equal(one, want) for one in found)


@pytest.mark.parametrize("uuids", [("a", "b"), ("a", "a")])
def test_ranks_that_share_a_gpu_are_told_so(monkeypatch: pytest.MonkeyPatch, uuids: tuple[str, str]) -> None:
    """Before anything is loaded, and on each of them. Every rank sees one GPU, as Ray gives them."""
    own = threading.local()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=own.uuid))

    def choose(group: Group) -> str:
        own.uuid = uuids[group.rank]
        try:
            return str(GroupPeers(group).device(torch.device("cuda")))
        except ConfigError as error:
            return f"{error.param}: {error.message}"

    with ranks(2, choose) as (group, others):
        told = [choose(group), others[0].result(10)]
    if uuids[0] != uuids[1]:
        assert told == ["cuda:0"] * 2
    else:
        words = "ranks 0, 1 have the same GPU: tensor_parallel_size = 2 needs 2 GPUs"
        assert told == [f"tensor_parallel_size: {words}"] * 2
