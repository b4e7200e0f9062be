"""Nobody starves under pressure without end, and the checks that guard the streams catch a broken engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from support.engine_driver import LIMITS, EngineDriver, plain, request, run_alone
from support.engine_scenarios import make_script, make_setting, output_length, play

from ellm.worker.cache.block_pool import BlockPool
from ellm.worker.cache.prefix_index import PrefixIndex
from ellm.worker.engine.plan import BatchPlan
from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_blocks", [20, 50])
def test_nobody_starves_while_others_keep_coming(num_blocks: int, depth: int) -> None:
    """More work comes than the engine can do, for a thousand turns. Each request still ends within the time
    that those before it need one after the other, with a turn lost for each block that was waited for."""
    config = plain(max_step_tokens=32, max_num_seqs=16, pipeline_depth=depth, watermark=0.0)
    limits = replace(LIMITS, num_blocks=num_blocks)
    driver, rng = EngineDriver(limits, scheduler=config, check=False), Random(num_blocks)
    ahead, bound, ended = 0, dict[str, int](), dict[str, int]()
    for turn in range(1000):
        if turn % 2 == 0:
            num_prompt, max_tokens = rng.randint(1, 40), rng.randint(1, 40)
            name = f"r{turn}"
            driver.add(request(name, num_prompt, seed=turn, max_tokens=max_tokens, ignore_eos=True))
            ahead += 2 + num_prompt // (32 - 16 + 1) + max_tokens + max_tokens // 4
            bound[name] = ahead + turn
        driver.turn()
        if turn % 100 == 0:
            driver.core.check()
        for name in driver.reasons:
            ended.setdefault(name, turn)
    assert driver.core.report(0.0).num_waiting > 100  # the pressure was real
    assert driver.core.report(0.0).num_preemptions > 50
    assert len(ended) > 50
    assert all(ended[name] <= bound[name] for name in ended)
    assert not [name for name in bound if name not in ended and bound[name] < 1000]


def test_priorities_do_not_stop_those_who_run() -> None:
    """The better priority goes first at the door; who is inside comes to its end."""
    driver = EngineDriver(scheduler=plain(max_num_seqs=2))
    driver.add(request("low", max_tokens=30, ignore_eos=True, priority=9))
    driver.turn()
    for turn in range(60):
        driver.add(request(f"high{turn}", seed=turn, max_tokens=5, ignore_eos=True, priority=0))
        driver.turn()
        if "low" in driver.reasons:
            break
    assert driver.reasons["low"] == "length"


def without_forgetting(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evicted block keeps its name."""
    monkeypatch.setattr(PrefixIndex, "forget", lambda self, block: self._hash_of.__setitem__(block, None))


def without_recompute(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preempted sequence believes that its KV is still there."""

    def release(self: EngineState, seq: Sequence) -> None:
        planned, computed = seq.num_planned, seq.num_computed
        original(self, seq)
        seq.num_planned, seq.num_computed = planned, computed

    def start(self: EngineState, seq: Sequence) -> None:
        if seq.high_water:
            seq.num_planned = len(seq.tokens) - 1
        original_start(self, seq)

    original, original_start = EngineState._release, EngineState.start
    monkeypatch.setattr(EngineState, "_release", release)
    monkeypatch.setattr(EngineState, "start", start)


def without_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is named by its own tokens, whatever came before."""
    monkeypatch.setattr(
        "ellm.worker.engine.sequence.next_hash", lambda parent, tokens: repr(list(tokens)).encode()
    )


def without_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block goes when its first user goes."""

    def release(self: BlockPool, blocks: list[int]) -> None:
        for block in blocks:
            self._references[block] = min(1, self._references[block])
        original(self, blocks)

    original = BlockPool.release
    monkeypatch.setattr(BlockPool, "release", release)


def without_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hit may cover the whole prompt."""
    monkeypatch.setattr(Sequence, "num_hittable", property(lambda self: len(self.tokens)))


BROKEN = [without_forgetting, without_recompute, without_chain, without_counting, without_last_token]


def some_script_fails(seeds: range) -> bool:
    for seed in seeds:
        rng = Random(seed)
        setting = replace(make_setting(rng, rng.choice([1.0, 1.3, 2.0])), prefix_caching=True)
        script = make_script(rng, 12, setting.max_total)
        try:
            driver = play(setting, script)
        except (AssertionError, KeyError, IndexError):
            return True
        for arrival in script:
            name = arrival.request.request_id
            alone = run_alone(arrival.request, setting.limits, output_length)
            if driver.reasons[name] != "abort" and driver.streams[name] != alone.streams[name]:
                return True
    return False


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_engine_is_caught(
    damage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not some_script_fails(range(3))
    damage(monkeypatch)
    assert some_script_fails(range(40))


def rows_of(plan: BatchPlan) -> list[tuple[int, int, int, list[int]]]:
    """Who runs which positions in which blocks; a live table may have grown since."""
    size = LIMITS.block_size
    return [
        (e.seq_id, e.start, e.num_tokens, e.block_ids[: -(-(e.start + e.num_tokens) // size)])
        for e in plan.entries
    ]


def test_no_decision_depends_on_a_length_to_come() -> None:
    """Two worlds that differ only in how long outputs will be: the same plans until the first one ends."""
    config = plain(max_step_tokens=24, max_num_seqs=12)
    worlds = []
    for shift in (0, 1):
        driver = EngineDriver(
            replace(LIMITS, num_blocks=40),
            scheduler=config,
            output_length=lambda new, shift=shift: 15 + (new.sampling.seed * 7 + 11 * shift) % 20,
        )
        for i in range(20):
            driver.add(request(f"r{i}", 10, seed=i, max_tokens=40))
        while not driver.reasons:
            driver.turn()
        worlds.append(driver.plans)
    common = min(len(plans) for plans in worlds) - 1  # at depth two, one more was planned than came back
    assert common > 14
    assert [rows_of(plan) for plan in worlds[0][:common]] == [rows_of(plan) for plan in worlds[1][:common]]
