"""Plans that an executor runs before it serves: the largest admissible one, and one of each kind of step.

They name sequences below zero and blocks of a pool of their own, so nothing of them is left over.
"""

from __future__ import annotations

from collections.abc import Iterator

from ellm.worker.api.config import SchedulerConfig, WorkerConfig
from ellm.worker.api.request import SamplingParams
from ellm.worker.engine.plan import BatchPlan, NewSequence, PlanEntry

# Every feature of the sampler at once.
_COSTLY = SamplingParams(
    temperature=0.7,
    top_k=50,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.1,
    frequency_penalty=0.1,
    presence_penalty=0.1,
    logit_bias=((0, 1.0),),
    logprobs=1,
    prompt_logprobs=1,
)
_GREEDY = SamplingParams(temperature=0.0)
_SCORED_ROWS = 256


def _plan(
    step: int, entries: list[PlanEntry], sampling: SamplingParams, released: tuple[int, ...]
) -> BatchPlan:
    new = tuple(NewSequence(e.seq_id, e.token_ids, (), sampling, 0) for e in entries if not e.recompute)
    rows = sum(e.num_tokens for e in entries)
    num_decode = sum(e.num_tokens == 1 for e in entries)
    return BatchPlan(step, tuple(entries), new, released, rows, num_decode)


def largest_plans(config: WorkerConfig, max_model_len: int) -> tuple[list[BatchPlan], int]:
    """The plans that take most memory, without and with rows of a hole, and the blocks that they need."""
    block_size, scheduler = config.cache.block_size, config.scheduler
    plan, num_blocks = largest_plan(scheduler, block_size, max_model_len)
    num_blocks = max(2, num_blocks)  # other kinds of step name two
    plans = [plan]
    # The longest hole that leaves a row for its own sequence.
    rows = min(scheduler.max_step_tokens, max_model_len) - 1
    hole = min(config.cache.transient_blocks, rows // block_size)
    if hole:
        transient = [num_blocks + 1 + i for i in range(hole)]
        plans.append(_plan_with_hole(scheduler, block_size, max_model_len, [*transient, num_blocks]))
        num_blocks += 1
    return plans, num_blocks


def _plan_with_hole(
    scheduler: SchedulerConfig, block_size: int, max_model_len: int, table: list[int]
) -> BatchPlan:
    """As large as any, of them the rows of one sequence all whose blocks but the last are transient."""
    length, seq_id = (len(table) - 1) * block_size, -1 - scheduler.max_num_seqs
    rows, seqs = scheduler.max_step_tokens - length - 1, scheduler.max_num_seqs - 1
    entries = [PlanEntry(seq_id, length, 1, (0,), table, samples=True)]
    entries += _entries(rows, seqs, block_size, max_model_len)[0]
    entries.append(PlanEntry(seq_id, 0, length, (0,) * length, table, samples=False, recompute=True))
    return _plan(0, entries, _COSTLY, ())


def largest_plan(scheduler: SchedulerConfig, block_size: int, max_model_len: int) -> tuple[BatchPlan, int]:
    """The plan that takes most memory, and how many blocks it names.

    As many rows as a step may have, as many of them sampling as may run, each with every sampler feature.
    One decode row has the longest context, the others short ones: bodies walk the pool in tiles, but what
    decode rows keep of their parts is as wide for all as for the longest.
    Prompt log-probabilities are made in slices: a few rows of them stand for all.
    """
    entries, num_blocks = _entries(
        scheduler.max_step_tokens, scheduler.max_num_seqs, block_size, max_model_len
    )
    return _plan(0, entries, _COSTLY, ()), num_blocks


def _entries(rows: int, seqs: int, block_size: int, max_model_len: int) -> tuple[list[PlanEntry], int]:
    """Entries of `rows` rows and up to `seqs` sequences, and the number of blocks that they name."""
    num_decode = min(rows, seqs)
    while num_decode and num_decode + len(_chunks(rows - num_decode, max_model_len)) > seqs:
        num_decode -= 1
    # Decode rows share blocks, each with a slot of its own; the longest reads one block again and again.
    entries = [
        PlanEntry(-1 - i, i % block_size, 1, (0,), [i // block_size], samples=True)
        for i in range(num_decode - 1)
    ]
    num_blocks = -(-len(entries) // block_size)
    if num_decode:
        table = [num_blocks] * -(-max_model_len // block_size)
        entries.append(PlanEntry(-num_decode, max_model_len - 1, 1, (0,), table, samples=True))
        num_blocks += 1
    sizes = _chunks(rows - num_decode, max_model_len)
    if len(sizes) > seqs:
        sizes = [min(rows, max_model_len)] * seqs
    for i, size in enumerate(sizes):
        blocks = list(range(num_blocks, num_blocks - (-size // block_size)))
        num_blocks += len(blocks)
        entries.append(
            PlanEntry(-1 - num_decode - i, 0, size, (0,) * size, blocks, samples=True, prompt_logprobs=i == 0)
        )
    return entries, num_blocks


def _chunks(rows: int, max_model_len: int) -> list[int]:
    """Sizes of the fewest chunks that make `rows`, the first short enough to be scored."""
    first = min(rows, max_model_len, _SCORED_ROWS)
    sizes = [first] if first else []
    rows -= first
    while rows:
        sizes.append(min(rows, max_model_len))
        rows -= sizes[-1]
    return sizes


def step_kinds(scheduler: SchedulerConfig, block_size: int, max_model_len: int) -> Iterator[BatchPlan]:
    """Small plans: prefills with every sampler feature and with none, decodes of one and of several rows, a
    mixed step, an end.

    Just-in-time bodies compile on the first call of each kind.
    """
    size = max(1, min(block_size + 1, max_model_len - 1, scheduler.max_step_tokens - 1))
    blocks = [0, 1]
    ids = tuple(range(-1, -4, -1))[: max(1, min(3, scheduler.max_num_seqs, scheduler.max_step_tokens))]

    def prefill(seq_id: int) -> PlanEntry:
        return PlanEntry(seq_id, 0, size, (0,) * size, blocks, samples=True)

    yield _plan(0, [prefill(ids[0])], _COSTLY, ())
    yield _plan(1, [prefill(ids[0])], _GREEDY, ())
    released: tuple[int, ...] = ()
    for count in range(1, len(ids) + 1):
        entries = [PlanEntry(i, size, 1, (0,), blocks, samples=True) for i in ids[:count]]
        yield _plan(1 + count, entries, _GREEDY, released)
        released = ids[:count]
    if len(ids) > 1:
        mixed = [PlanEntry(ids[0], size, 1, (0,), blocks, samples=True), prefill(ids[1])]
        yield _plan(5, mixed, _GREEDY, ids)
    yield BatchPlan(6, (), (), ids, 0, 0)
