"""The event loop: when steps start and end, what an engine that does not get on gives, what a token costs."""

from __future__ import annotations

import pytest

from ellm.loadtest.sim.device import EOS
from ellm.loadtest.sim.executor import TimedExecutor
from ellm.loadtest.sim.replica import Replica, SimulationError, Trajectory
from ellm.loadtest.sim.workload import SimRequest
from ellm.worker.api.config import CacheConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.cost_model import CostModel
from ellm.worker.api.request import SamplingParams
from ellm.worker.engine.core import EngineCore
from ellm.worker.engine.plan import (
    BatchPlan,
    BlockCopy,
    ModelLimits,
    NewSequence,
    PlanEntry,
    StepResult,
    StreamedBlock,
)
from ellm.worker.engine.policies import Policy
from ellm.worker.engine.sequence import Sequence
from ellm.worker.engine.state import EngineState
from ellm.worker.executor.simulated_link import LinkSpeed

LIMITS = ModelLimits(num_blocks=64, block_size=4, max_model_len=256, vocab_size=1000, eos_token_ids=(EOS,))
STEP_S = 0.1
LINK = LinkSpeed(bytes_per_s=100.0)


def executor(lengths: list[int], limits: ModelLimits = LIMITS) -> TimedExecutor:
    cost = CostModel.known(overhead_s=STEP_S)
    return TimedExecutor(limits, cost, lambda new: lengths[new.sampling.seed], LINK)


def run(
    requests: list[SimRequest], *, depth: int = 2, policy: Policy | None = None, max_num_seqs: int = 8
) -> Trajectory:
    scheduler = SchedulerConfig(pipeline_depth=depth, max_num_seqs=max_num_seqs)
    config = WorkerConfig(scheduler=scheduler, cache=CacheConfig(prefix_caching=False))
    core = EngineCore(LIMITS, config, policy=policy)
    return Replica(core, executor([r.output_tokens for r in requests]), requests).run()


def request(arrival_s: float, output_tokens: int, prompt_tokens: int = 6) -> SimRequest:
    return SimRequest(arrival_s, prompt_tokens, output_tokens, max_tokens=100)


@pytest.mark.parametrize("depth", [1, 2])
def test_one_request_gets_a_token_per_step(depth: int) -> None:
    done = run([request(3.0, 4)], depth=depth)
    assert list(done.token_times[0]) == pytest.approx([3.1, 3.2, 3.3, 3.4])
    assert done.report.generation_tokens == 4
    # With two plans outstanding one more was under way when the end was seen.
    assert done.duration_s == pytest.approx(3.4 if depth == 1 else 3.5)


def test_who_comes_during_a_step_waits_for_the_plans_that_are_made() -> None:
    """At 0.25 the step that ends at 0.3 runs, and the one to 0.4 is planned: the first token comes at 0.5."""
    done = run([request(0.0, 10), request(0.25, 2)])
    assert list(done.token_times[1]) == pytest.approx([0.5, 0.6])
    done = run([request(0.0, 10), request(0.25, 2)], depth=1)
    assert list(done.token_times[1]) == pytest.approx([0.4, 0.5])


def test_an_idle_engine_jumps_to_the_next_arrival() -> None:
    done = run([request(0.0, 1), request(1_000.0, 1)])
    assert [list(times) for times in done.token_times] == [
        pytest.approx([0.1]),
        pytest.approx([1_000.1]),
    ]
    assert done.report.num_steps < 10


def test_every_request_gets_its_true_length() -> None:
    lengths = [1, 2, 37, 90, 5]
    done = run([request(0.01 * i, n) for i, n in enumerate(lengths)], max_num_seqs=2)
    assert [len(times) for times in done.token_times] == lengths
    assert done.mean_batch == pytest.approx(sum(lengths) / done.report.num_steps, rel=0.2)


class Refuses(Policy):
    """Lets nobody in."""

    def may_admit(self, state: EngineState, seq: Sequence, num_blocks: int, now: float) -> bool:
        return False


def test_a_wedged_engine_is_an_error() -> None:
    with pytest.raises(SimulationError, match=r"wedged at 2\.000 s: 0 run, 0 are parked, 1 wait"):
        run([request(2.0, 1)], policy=Refuses())


def test_steps_that_take_no_time_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ellm.loadtest.sim.replica._STUCK_AFTER", 20)
    requests = [request(0.0, 90)]
    core = EngineCore(LIMITS, WorkerConfig())
    free = TimedExecutor(LIMITS, CostModel(), lambda new: 90, LINK)  # a model that predicts 0
    with pytest.raises(SimulationError, match="20 steps took no time"):
        Replica(core, free, requests).run()


def plan(step: int, **fields: object) -> BatchPlan:
    values: dict[str, object] = dict(entries=(), new=(), released=(), num_rows=0, num_decode=0)
    return BatchPlan(step=step, **{**values, **fields})  # type: ignore[arg-type]


def row(seq_id: int, index: int) -> PlanEntry:
    return PlanEntry(seq_id, 4 + index, 1, (), [0, 1, 2], samples=True, output_index=index)


def tokens(result: StepResult) -> list[bool]:
    return [token == EOS for token in result.token_ids]


def test_the_executor_ends_a_sequence_at_its_length_in_every_residence() -> None:
    one = executor([3, 1])
    first = NewSequence(0, (5, 5), (), SamplingParams(seed=0), 0)
    second = NewSequence(1, (6, 6), (), SamplingParams(seed=1), 0)
    assert tokens(one.execute(plan(0, entries=(row(0, 0), row(1, 0)), new=(first, second)))) == [False, True]
    again = NewSequence(2, (5, 5), (1, 1), SamplingParams(seed=0), 0)
    result = one.execute(plan(1, entries=(row(2, 2),), new=(again,), released=(0, 1)))
    assert tokens(result) == [True]
    assert result.elapsed_s == pytest.approx(STEP_S)


def test_a_streamed_step_takes_the_longer_of_link_and_layers() -> None:
    one = executor([9], limits=ModelLimits(64, 4, 256, 1000, (EOS,), num_host_blocks=8, block_bytes=10))
    new = NewSequence(0, (5, 5), (), SamplingParams(), 0)
    short = one.execute(plan(0, entries=(row(0, 0),), new=(new,), streams=(StreamedBlock(0, 64),)))
    assert short.elapsed_s == pytest.approx(STEP_S)
    streams = tuple(StreamedBlock(i, 64 + i) for i in range(3))
    assert one.execute(plan(1, entries=(row(0, 1),), streams=streams)).elapsed_s == pytest.approx(0.3)


def test_copies_run_beside_the_steps() -> None:
    """A block of 10 bytes takes 0.1 s at 100 bytes per second; two of one direction follow each other."""
    one = executor([9], limits=ModelLimits(64, 4, 256, 1000, (EOS,), num_host_blocks=8, block_bytes=10))
    new = NewSequence(0, (5, 5), (), SamplingParams(), 0)
    saves = tuple(BlockCopy(i, i, i) for i in range(2))
    first = one.execute(plan(0, entries=(row(0, 0),), new=(new,), saves=saves, loads=(BlockCopy(2, 5, 5),)))
    assert sorted(first.copies_done) == [0, 2]
    assert first.elapsed_s == pytest.approx(STEP_S)
    assert first.copy_times is not None
    assert first.copy_times.saved_bytes == 10
    waited = one.execute(plan(1))  # no rows: until the next copy ends
    assert waited.copies_done == (1,)
    assert waited.elapsed_s == pytest.approx(0.1)
    third = one.execute(plan(2, entries=(row(0, 1),), saves=(BlockCopy(3, 3, 3),), waits=True))
    assert third.elapsed_s == pytest.approx(0.1 + STEP_S)
    assert third.copies_done == (3,)
