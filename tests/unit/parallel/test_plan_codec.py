"""Plans survive being sent, whatever they carry, and tables are sent once."""

from __future__ import annotations

from dataclasses import fields, replace
from random import Random

import pytest
from support.engine_driver import LIMITS, EngineDriver, plain, request
from support.random_residency import RandomResidency

from ellm.worker.api.request import SamplingParams
from ellm.worker.engine.plan import BatchPlan, BlockCopy, NewSequence, PlanEntry, StreamedBlock
from ellm.worker.executor.simulated_link import LinkSpeed
from ellm.worker.parallel.messages import PLAN, Message, checksum
from ellm.worker.parallel.plan_codec import PlanPacker, PlanUnpacker

TIGHT = replace(LIMITS, num_blocks=24, num_host_blocks=40, num_transient_blocks=20, block_bytes=1000)
COSTLY = SamplingParams(
    temperature=0.7,
    top_p=0.1 + 0.2,
    seed=2**64 - 1,
    logit_bias=((3, float("-inf")), (4, 1e-300)),
    logprobs=0,
    stop_token_ids=(1, 2),
    min_tokens=3,
)


def seen(plan: BatchPlan, block_size: int) -> BatchPlan:
    """As an executor reads it: tables as long as they must be."""
    entries = tuple(
        replace(e, block_ids=e.block_ids[: -(-(e.start + e.num_tokens) // block_size)]) for e in plan.entries
    )
    num_decode = sum(e.num_tokens == 1 and e.samples for e in entries)
    return replace(plan, entries=entries, num_decode=num_decode)


def test_every_field_arrives() -> None:
    table = [7, 3, 9, 100]
    entries = (
        PlanEntry(1 << 40, 31, 1, (), table, True, 5),
        PlanEntry(-2, 0, 17, tuple(range(17)), [4, 5], True, 0, prompt_logprobs=True),
        PlanEntry(1 << 40, 16, 16, (1,) * 16, table, False, recompute=True),
    )
    new = (
        NewSequence(1 << 40, (5, 6), (7,), COSTLY, 3),
        NewSequence(-2, tuple(range(17)), (), SamplingParams(), 0),
    )
    copies = (BlockCopy(0, 1, 2), BlockCopy(1, 3, 4)), (BlockCopy(2, 5, 6),)
    plan = BatchPlan(7, entries, new, (8, 9), 34, 1, *copies, (StreamedBlock(10, 11),), True, "ahead")
    got = PlanUnpacker().unpack(PlanPacker(16).pack(plan))
    assert seen(got, 16) == seen(plan, 16)
    assert got.new == new
    assert {field.name for field in fields(BatchPlan)} == set(BatchPlan.__slots__)


def test_the_plans_of_an_engine_arrive() -> None:
    """With parking, holes and copies at random; tables are live lists that change between plans."""
    plans = [plan for seed in range(4) for plan in sent_plans(seed)]
    assert any(entry.recompute for plan in plans for entry in plan.entries)
    assert any(plan.streams for plan in plans)
    assert any(plan.loads for plan in plans)


def sent_plans(seed: int) -> list[BatchPlan]:
    """Plans of a run whose executor gets each as it comes out of the wire."""
    rng = Random(seed)
    driver = EngineDriver(
        TIGHT,
        scheduler=plain(max_num_seqs=6, max_step_tokens=60),
        policy=RandomResidency(seed),
        link=LinkSpeed(2e5),
    )
    size = driver.core.limits.block_size
    packer, unpacker = PlanPacker(size), PlanUnpacker()
    execute, plans = driver.executor.execute, []

    def through_the_wire(plan: BatchPlan) -> object:
        got = unpacker.unpack(packer.pack(plan))
        assert seen(got, size) == seen(plan, size)
        plans.append(plan)
        return execute(got)

    driver.executor.execute = through_the_wire  # type: ignore[method-assign,assignment]
    for i in range(8):
        driver.add(request(f"r{i}", rng.randint(1, 30), seed=i, max_tokens=30, ignore_eos=True))
        driver.turn()
    driver.run(max_turns=20_000)
    return plans


def test_a_table_is_sent_once() -> None:
    packer = PlanPacker(16)
    table = list(range(1000))
    new = NewSequence(1, (0,), (), SamplingParams(), 0)
    first = BatchPlan(0, (PlanEntry(1, 15_999, 1, (0,), table, True),), (new,), (), 1, 1)
    again = BatchPlan(1, (PlanEntry(1, 15_999, 1, (0,), table, True),), (), (), 1, 1)
    assert len(packer.pack(first)) > 8000
    assert len(packer.pack(again)) < 200


def test_a_plan_that_was_missed_is_noticed() -> None:
    packer, unpacker = PlanPacker(16), PlanUnpacker()
    new = NewSequence(1, (0,), (), SamplingParams(), 0)
    packer.pack(BatchPlan(0, (PlanEntry(1, 0, 16, (0,) * 16, [5], True),), (new,), (), 16, 0))
    later = packer.pack(BatchPlan(1, (PlanEntry(1, 16, 1, (), [5, 6], True),), (), (), 1, 1))
    with pytest.raises(AssertionError, match="sequence 1: 0 blocks are known, not 1"):
        unpacker.unpack(later)


def test_messages() -> None:
    message = Message(PLAN, 2**40, checksum((1, 2, 3)), b"plan")
    assert Message.unpack(message.pack()) == message
    assert checksum((1, 2, 3)) != checksum((1, 3, 2))
    assert checksum(()) == 0
