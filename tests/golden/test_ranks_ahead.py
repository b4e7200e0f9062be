"""What devices do ahead of their hosts, in a group of ranks: steps are begun before the one before has been
read, and recorded steps are replayed by all ranks or by none. Tokens stay one rank's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import golden
from support.golden import Checkpoint
from support.ranks import RankPool
from support.replays import ReplayingRanks
from support.spoken import Lagging, requests_of_every_kind, spoken

from ellm.worker.executor.base import EndedStep
from ellm.worker.model.pieces import piece_rows

ROOM = {"num_blocks": 40, "transient_blocks": 12, "host_bytes": 1 << 20}
PIECE_ROWS = 48


@pytest.mark.parametrize("policy", ["full-chunked", "literal(0.5, stream=0.5)"])
def test_ranks_begin_the_next_step_before_the_last_is_read(
    ranks: RankPool, checkpoint: Callable[[str], Checkpoint], policy: str
) -> None:
    """Greedy, drawn, scored, penalised and stopped requests, also where blocks leave, come back and are
    streamed meanwhile; each rank copies its part of a block, and all must have for it to count."""
    folder, _ = checkpoint("llama-8-heads")
    requests = requests_of_every_kind(2)
    alone = golden.executor(folder, jit=False, **ROOM)
    expected, _ = spoken(alone, requests, policy)
    told = {}
    for queues in (True, False):
        with ranks.group(golden.config(folder, jit=False, tensor_parallel_size=2, **ROOM)) as executor:
            assert not executor.queues, "a CPU has computed what it was asked for"
            executor.queues = queues
            whole = Lagging(executor, lambda plan, group=executor: EndedStep(group.execute(plan)))  # type: ignore[misc]
            seen = Lagging(executor, executor.begin) if queues else whole
            told[queues], _ = spoken(seen, requests, policy)
        assert ranks.ends == ["closed"], "both ranks have sampled the same tokens, step by step"
        begun_early = seen.read_first.count(False)
        assert begun_early > 5 if queues else begun_early == 0
    assert told == {True: expected, False: expected}


@pytest.mark.parametrize(
    "disturbance",
    [{}, {"failing": (1, 2)}, {"failing": (0, 6)}, {"unable": 1}],
    ids=["all record", "one fails at a step", "one fails at a piece", "one cannot at all"],
)
def test_all_ranks_replay_or_none_does(
    ranks: RankPool,
    checkpoint: Callable[[str], Checkpoint],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    disturbance: dict[str, object],
) -> None:
    folder, _ = checkpoint("llama-8-heads")
    requests = requests_of_every_kind(1)
    alone = golden.executor(folder, jit=False, num_blocks=60)
    layers = alone.runner.cache.num_layers
    expected, _ = spoken(alone, requests, "full-chunked")
    around = ReplayingRanks(tmp_path, **disturbance)  # type: ignore[arg-type]
    config = golden.config(
        folder,
        jit=False,
        num_blocks=60,
        tensor_parallel_size=2,
        cuda_graphs=True,
        cuda_graph_rows=PIECE_ROWS,
    )
    with ranks.group(config, around=around) as executor:
        executor.queues = True
        tokens, _ = spoken(Lagging(executor, executor.begin), requests, "full-chunked")
        whole, pieces = executor.local.runner.num_replays
    assert ranks.ends == ["closed"]
    assert tokens == expected
    first, second = around.told(2)
    assert [one["replays"] for one in first] == [one["replays"] for one in second]
    if not disturbance:
        sampled, recorded = first
        assert first == second, "the same sizes in the same order"
        assert recorded["sizes"].count("piece") == len(piece_rows(PIECE_ROWS)) * (layers + 1)  # type: ignore[attr-defined]
        assert len(sampled["sizes"]) > 4, "a few of them to see what they take"  # type: ignore[arg-type]
        assert whole > 5
        assert pieces > 0
        return
    cause = {
        "failing": "another rank cannot" if disturbance.get("failing", (0,))[0] else "records no more",  # type: ignore[index]
        "unable": "another rank cannot record steps",
    }[next(iter(disturbance))]
    assert cause in caplog.text
    at_a_piece = disturbance.get("failing") == (0, 6)
    assert (whole > 5) == at_a_piece, "a kind of step that all could record is replayed"
    assert pieces == 0
