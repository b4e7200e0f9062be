"""The simulated executor refuses what hardware would get wrong, and its tokens depend on history alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from support.engine_driver import COSTS, EOS, LIMITS

from ellm.worker.api.cost_model import CostModel
from ellm.worker.api.request import SamplingParams
from ellm.worker.engine.plan import BatchPlan, NewSequence, PlanEntry, StepResult, step_features
from ellm.worker.executor.simulated import PlanViolation, SimulatedExecutor

A, B = tuple(range(1, 11)), tuple(range(21, 31))  # two prompts of ten tokens; blocks hold four


def new(seq_id: int, prompt: tuple[int, ...], **fields: Any) -> NewSequence:
    outputs = fields.pop("output_ids", ())
    choice = fields.pop("choice_index", 0)
    return NewSequence(seq_id, prompt, outputs, SamplingParams(**fields), choice)


def entry(seq_id: int, start: int, tokens: tuple[int, ...], blocks: list[int], **fields: Any) -> PlanEntry:
    values: dict[str, Any] = {"num_tokens": len(tokens), "samples": True, **fields}
    return PlanEntry(seq_id, start, token_ids=tokens, block_ids=blocks, **values)


def plan(step: int, *entries: PlanEntry, **fields: Any) -> BatchPlan:
    values: dict[str, Any] = {
        "new": (),
        "released": (),
        "num_rows": sum(e.num_tokens for e in entries),
        "num_decode": sum(e.num_tokens == 1 and e.samples for e in entries),
        **fields,
    }
    return BatchPlan(step, entries, **values)


def started(**limits: int) -> tuple[SimulatedExecutor, tuple[int, ...]]:
    """Sequences 1 (blocks 0, 1, 2) and 2 (blocks 5, 4, 3) after their prompts; the tokens they got."""
    executor = SimulatedExecutor(replace(LIMITS, **limits), COSTS)
    first = plan(0, entry(1, 0, A, [0, 1, 2]), entry(2, 0, B, [5, 4, 3]), new=(new(1, A), new(2, B, seed=1)))
    return executor, executor.execute(first).token_ids


def row(t: tuple[int, ...], **fields: Any) -> PlanEntry:
    """The right decode row of sequence 1, or one that `fields` spoil."""
    return replace(entry(1, 10, t[:1], [0, 1, 2], output_index=1), **fields)


def test_the_right_plan_runs() -> None:
    executor, t = started()
    other = entry(2, 10, t[1:], [5, 4, 3], output_index=1)
    result = executor.execute(plan(1, row(t), other))
    assert len(result.token_ids) == 2
    unknown = [replace(e, start=11, token_ids=(), output_index=2) for e in (row(t), other)]
    assert len(executor.execute(plan(2, *unknown)).token_ids) == 2


BAD: dict[str, Callable[[tuple[int, ...]], BatchPlan]] = {
    "block of another": lambda t: plan(1, row(t, block_ids=[0, 4, 2])),
    "blocks in the wrong order": lambda t: plan(1, row(t, block_ids=[1, 0, 2])),
    "block nobody wrote": lambda t: plan(1, row(t, block_ids=[9, 1, 2])),
    "block outside the pool": lambda t: plan(1, row(t, block_ids=[0, 1, 64])),
    "too few blocks": lambda t: plan(1, row(t, block_ids=[0, 1])),
    "wrong token": lambda t: plan(1, row(t, token_ids=(t[0] ^ 1,))),
    "a position left out": lambda t: plan(1, row(t, start=11)),
    "a token nobody sampled": lambda t: plan(1, row(t, start=11, token_ids=(), output_index=2)),
    "wrong output index": lambda t: plan(1, row(t, output_index=0)),
    "samples in the middle": lambda t: plan(1, entry(1, 8, A[8:], [0, 1, 2], output_index=1)),
    "an unknown sequence": lambda t: plan(1, row(t, seq_id=3)),
    "twice in one plan": lambda t: plan(1, row(t), row(t)),
    "one slot for two": lambda t: plan(1, row(t), entry(2, 10, t[1:], [5, 4, 2], output_index=1)),
    "wrong step": lambda t: plan(2, row(t)),
    "wrong number of rows": lambda t: plan(1, row(t), num_rows=2),
    "wrong number of decode rows": lambda t: plan(1, row(t), num_decode=0),
    "a chunk before a row": lambda t: plan(1, entry(2, 9, (B[9], t[1]), [5, 4, 3], output_index=1), row(t)),
    "released and named": lambda t: plan(1, row(t), released=(1,)),
    "released and never here": lambda t: plan(1, row(t), released=(7,)),
    "announced twice": lambda t: plan(1, row(t), new=(new(1, A),)),
    "no entry": lambda t: plan(1),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_wrong_plan_is_refused(bad: Callable[[tuple[int, ...]], BatchPlan]) -> None:
    executor, tokens = started()
    with pytest.raises(PlanViolation):
        executor.execute(bad(tokens))


def test_a_block_given_away_too_early_is_noticed() -> None:
    """Sequence 3 takes block 1 while sequence 1 still needs it."""
    executor, t = started()
    executor.execute(plan(1, entry(3, 0, A[:4], [1], samples=False), new=(new(3, A),)))
    with pytest.raises(PlanViolation, match="block 1"):
        executor.execute(plan(2, row(t)))


def test_a_stale_hit_is_noticed() -> None:
    """The prefix of 3 is not that of 1, though the block's own tokens are."""
    executor, _ = started()
    prompt = (*B[:4], *A[4:8], 40)
    with pytest.raises(PlanViolation, match="block 1"):
        executor.execute(plan(1, entry(3, 8, (40,), [5, 1, 6]), new=(new(3, prompt),)))


def test_a_context_that_is_too_long_is_refused() -> None:
    executor, t = started(max_model_len=10)
    with pytest.raises(PlanViolation, match="past the context"):
        executor.execute(plan(1, row(t)))


def first_token(prompt: tuple[int, ...], output_ids: tuple[int, ...] = (), **fields: Any) -> int:
    executor = SimulatedExecutor(LIMITS, COSTS)
    known = (*prompt, *output_ids)
    one = entry(1, 0, known, list(range(8)), output_index=len(output_ids))
    return executor.execute(plan(0, one, new=(new(1, prompt, output_ids=output_ids, **fields),))).token_ids[0]


def test_a_token_depends_on_seed_choice_and_history() -> None:
    base = first_token(A)
    assert first_token(A) == base
    seeds = {first_token(A, seed=seed) for seed in range(20)}
    choices = {first_token(A, choice_index=choice) for choice in range(20)}
    histories = {first_token((*A, token)) for token in range(20)}
    assert min(len(seeds), len(choices), len(histories)) > 10
    assert first_token(A, (7, 8)) == first_token((*A, 7, 8))  # not on who said it


def test_it_says_end_of_text_where_it_is_told_to_and_nowhere_else() -> None:
    def stream(length: int | None, **fields: Any) -> list[int]:
        executor = SimulatedExecutor(LIMITS, COSTS, output_length=lambda new: length, verify=False)
        one = entry(1, 0, A, [0] * 99)
        said = [executor.execute(plan(0, one, new=(new(1, A, **fields),))).token_ids[0]]
        for step in range(1, 60):
            decode = entry(1, 9 + step, (said[-1],), [0] * 99, output_index=step)
            said.append(executor.execute(plan(step, decode)).token_ids[0])
        return said

    assert EOS not in stream(None)
    assert stream(5).index(EOS) == 4
    assert stream(1).index(EOS) == 0
    assert stream(5, min_tokens=9).index(EOS) == 8


def test_time_is_the_cost_models() -> None:
    executor, t = started()
    one = plan(1, row(t))
    assert executor.execute(one).elapsed_s == COSTS.predict(step_features(one)) > 0


def test_realtime_takes_the_time_it_says() -> None:
    executor = SimulatedExecutor(LIMITS, CostModel.known(overhead_s=0.05), realtime=True)
    start = time.perf_counter()
    result: StepResult = executor.execute(plan(0, entry(1, 0, A, [0, 1, 2]), new=(new(1, A),)))
    assert time.perf_counter() - start >= result.elapsed_s == 0.05


def test_features_of_a_plan() -> None:
    features = step_features(
        plan(
            0,
            entry(1, 10, (1,), [0, 1, 2]),
            entry(2, 8, (1,), [3, 4, 5], samples=False),
            entry(3, 4, A[:3], [6, 7], samples=False),
            entry(4, 0, A, [8, 9, 10], prompt_logprobs=True),
        )
    )
    assert (features.rows, features.decode_rows, features.prefill_rows) == (15, 1, 14)
    assert features.kv_tokens == 11 + 9 + 7 + 10
    assert features.attention_pairs == (5 + 6 + 7) + 55
    assert features.logits_rows == 1 + 10
