"""What the engine does with a request changes none of its tokens: docs/api.md's table, each cell by itself,
with full attention and with a sliding window.

Every way (a row) is played with requests of every feature (a column) at the same time, with another feature
first each time, until it was really gone with a request of each feature. A cell holds when that is so and
tokens, log-probabilities and scores of the prompt are bitwise those of each request alone with room for all;
with several ranks the scores are close.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from support import golden
from support.engine_driver import EngineDriver, plain, play
from support.golden import Checkpoint
from support.random_residency import RandomResidency
from support.ranks import RankPool
from support.tree import ROOT
from torch import Tensor

from ellm.worker.api.config import SchedulerConfig
from ellm.worker.api.output import TokenLogprobs
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.engine.plan import BatchPlan
from ellm.worker.executor.local import LocalExecutor
from ellm.worker.model.graphs import DecodeGraphs, DecodeSizes, Replay
from ellm.worker.model.inputs import StepInputs
from ellm.worker.model.inspect import read_architecture

pytestmark = [pytest.mark.needs_module(name) for name in ("numba", "llguidance")]

MODELS = {"full attention": "llama", "sliding window": "mistral-window"}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "minLength": 24, "maxLength": 30}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_pattern": ""},
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=36, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.9, top_p=0.95, seed=11)
HELD = replace(DRAWN, ignore_eos=False, grammar=json.dumps({"grammars": [{"json_schema": SCHEMA}]}))
SAMPLINGS = {
    "plain": GREEDY,
    "`n` > 1": DRAWN,
    "`logprobs`": replace(GREEDY, logprobs=2),
    "`echo` with `logprobs`": replace(GREEDY, logprobs=1, prompt_logprobs=1),
    "grammar": HELD,
}
CHOICES = {"`n` > 1": 3, "grammar": 2}  # of one prompt
MAX_TURNS = 40  # four to seven do as a rule: when copies end is the machine's to say
WAYS = (
    "preempted",
    "holes, recomputed or streamed",
    "to the host and back",
    "chunks, company, pipeline depth",
    "several ranks",
    "another worker goes on",
    "CUDA graphs",
)


@cache
def requests() -> dict[str, list[EngineRequest]]:
    """By feature. Prompts are longer than the window; choices share theirs."""
    made = {}
    for i, (feature, sampling) in enumerate(SAMPLINGS.items()):
        ids = tuple(golden.prompt(37 + 6 * i, seed=i))
        made[feature] = [
            EngineRequest(f"r{i}-{k}", ids, sampling, choice_index=k) for k in range(CHOICES.get(feature, 1))
        ]
    return made


def everyone(first: int = 0) -> list[EngineRequest]:
    """Those of one feature first, and so on in turns."""
    features = list(requests().values())
    first %= len(features)
    return [one for some in features[first:] + features[:first] for one in some]


@dataclass(frozen=True, slots=True)
class Played:
    """One way, gone by all."""

    streams: dict[str, list[int]]
    logprobs: dict[str, list[TokenLogprobs]]
    prompts: dict[str, tuple[TokenLogprobs | None, ...] | None]
    gone: frozenset[str]  # ids of the requests for which it was really gone
    exact: bool = True


def played(driver: EngineDriver, gone: set[str], exact: bool = True) -> Played:
    outputs = driver.outputs
    return Played(
        driver.streams,
        {name: [s for one in some for s in one.logprobs or ()] for name, some in outputs.items()},
        {
            name: next((one.prompt_logprobs for one in some if one.prompt_logprobs), None)
            for name, some in outputs.items()
        },
        frozenset(gone),
        exact,
    )


def names_of(driver: EngineDriver) -> dict[int, str]:
    """seq_id of each residence -> request id."""
    known = {(r.prompt_ids, r.choice_index): r.request_id for r in everyone()}
    return {new.seq_id: known[new.prompt_ids, new.choice_index] for plan in driver.plans for new in plan.new}


def preempted(driver: EngineDriver) -> set[str]:
    """Those that an executor was told of more than once: nothing of them had stayed."""
    names = names_of(driver)
    told = Counter(names[new.seq_id] for plan in driver.plans for new in plan.new)
    return {name for name, count in told.items() if count > 1}


def holed(driver: EngineDriver) -> set[str]:
    names = names_of(driver)
    return {names[entry.seq_id] for plan in driver.plans for entry in plan.entries if entry.recompute}


def loaded(driver: EngineDriver) -> set[str]:
    """Those that read a block which had come back from the host."""
    names, back, found = names_of(driver), set[int](), set[str]()
    for plan in driver.plans:
        back |= {copy.block for copy in plan.loads}
        found |= {names[e.seq_id] for e in plan.entries if back & set(e.block_ids)}
    return found


def chunked(driver: EngineDriver) -> set[str]:
    """Those whose prompt took more than one step, in the company of others."""
    names = names_of(driver)
    return {
        names[entry.seq_id]
        for plan in driver.plans
        for entry in plan.entries
        if len(plan.entries) > 1 and not entry.samples and not entry.recompute
    }


class Again:
    """What a CUDA graph does, without a GPU: the recorded call is made anew on the same inputs."""

    def __init__(self, most: int, width: int) -> None:
        self._shape = most, width

    def record(self, call: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        out = torch.zeros(self._shape)

        def replay() -> None:
            found = call()
            out[: len(found)].copy_(found)

        return replay, out

    def agree(self, problem: str | None) -> None:
        assert problem is None


class Watched(DecodeGraphs):
    """Knows which sequences took part in a replay."""

    def hidden(self, plan: BatchPlan, inputs: StepInputs) -> Tensor | None:
        found = super().hidden(plan, inputs)
        if found is not None:
            self.replayed |= {entry.seq_id for entry in plan.entries}
        return found

    replayed: set[int]


def with_graphs(executor: LocalExecutor, folder: Checkpoint) -> Watched:
    """A graph for every number of rows: the CPU's kernels know no rows that are not there."""
    runner = executor.runner
    sizes = DecodeSizes(tuple(range(1, 9)), (512,))
    ops, width = runner._sampler._ops, read_architecture(folder[0]).hidden_size
    made = Watched(runner._model, ops, runner.cache, sizes, runner._communicator, Again(8, width))
    made.replayed = set()
    made.record_all()
    runner.replay(made)
    return made


def loads(folder: Checkpoint, num_blocks: int, host: bool = False) -> LocalExecutor:
    room = {"transient_blocks": 20, "host_bytes": 1 << 20} if host else {}
    return golden.executor(folder[0], jit=True, num_blocks=num_blocks, **room)


def on_one(way: str, folder: Checkpoint, alone: Played, turn: int) -> Played:
    """A way that one rank goes."""
    starved = way in WAYS[:3]
    executor = loads(folder, 11 if starved else 200, host=way in WAYS[1:3])
    config, policy = plain(max_num_seqs=8, max_step_tokens=96), None
    asked = everyone(turn)
    if way == WAYS[1]:
        policy = RandomResidency(turn)
    elif way == WAYS[2]:
        config = SchedulerConfig(policy="full-swap", max_num_seqs=8, max_step_tokens=96)
    elif way == WAYS[3]:
        config = plain(max_num_seqs=8, max_step_tokens=33, pipeline_depth=2)
    elif way == WAYS[5]:
        asked = [
            replace(r, output_ids=tuple(alone.streams[r.request_id][: 3 + 2 * i]), attempt=1)
            for i, r in enumerate(asked)
        ]
    graphs = with_graphs(executor, folder) if way == WAYS[6] else None
    driver = play(executor, asked, config, policy)
    executor.close()
    find = {WAYS[0]: preempted, WAYS[1]: holed, WAYS[2]: loaded, WAYS[3]: chunked}.get(way)
    if graphs is not None:
        names = names_of(driver)
        return played(driver, {names[i] for i in graphs.replayed})
    return played(driver, find(driver) if find else {r.request_id for r in asked})


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, checkpoint: Callable[[str], Checkpoint]) -> Checkpoint:
    return checkpoint(MODELS[request.param])


@pytest.fixture(scope="module")
def alone(folder: Checkpoint) -> Played:
    """Each request by itself, one plan at a time, nothing found in a cache."""
    executor = loads(folder, 200)
    driver = EngineDriver(
        executor.limits, scheduler=plain(max_num_seqs=1, pipeline_depth=1), prefix_caching=False
    )
    driver.executor = executor  # type: ignore[assignment]
    for request in everyone():
        driver.add(request)
    driver.run()
    executor.close()
    return played(driver, set())


@pytest.fixture(scope="module", params=WAYS)
def way(
    request: pytest.FixtureRequest, folder: Checkpoint, alone: Played, ranks: RankPool
) -> tuple[str, list[Played]]:
    name = request.param
    if name == "several ranks":
        config = golden.config(folder[0], jit=True, num_blocks=200, tensor_parallel_size=2)
        with ranks.group(config) as executor:
            driver = play(executor, everyone(), plain(max_num_seqs=8, max_step_tokens=96))
        return name, [played(driver, {r.request_id for r in everyone()}, exact=False)]
    turns: list[Played] = []
    for turn in range(MAX_TURNS):
        turns.append(on_one(name, folder, alone, turn))
        gone = {one for played_once in turns for one in played_once.gone}
        if all(gone & {r.request_id for r in some} for some in requests().values()):
            break
    return name, turns


@pytest.mark.parametrize("feature", SAMPLINGS)
def test_a_cell(way: tuple[str, list[Played]], alone: Played, feature: str) -> None:
    name, turns = way
    asked = requests()[feature]
    gone = {one for played_once in turns for one in played_once.gone}
    assert gone & {r.request_id for r in asked}, f"no request of this feature was {name}"
    for got in turns:
        for request in asked:
            compare(request, got, alone, resumed=name == "another worker goes on")
    if feature in CHOICES:
        assert len({tuple(alone.streams[r.request_id]) for r in asked}) == len(asked)


def compare(request: EngineRequest, got: Played, alone: Played, resumed: bool) -> None:
    one = request.request_id
    assert got.streams[one] == alone.streams[one]
    want = alone.logprobs[one]
    if resumed:  # what was said elsewhere had its scores there
        want = want[len(want) - len(got.logprobs[one]) :]
    same(got.logprobs[one], want, got.exact)
    if request.sampling.prompt_logprobs is not None and not resumed:
        prompt, scores = got.prompts[one], alone.prompts[one]
        assert prompt is not None
        assert scores is not None
        assert len(prompt) == len(request.prompt_ids)
        same(prompt[1:], scores[1:], got.exact)


def same(got: object, want: object, exact: bool) -> None:
    assert isinstance(got, list | tuple)
    assert isinstance(want, list | tuple)
    if exact:
        assert list(got) == list(want)
    else:
        assert [s.logprob for s in got] == pytest.approx([s.logprob for s in want], abs=1e-4)


def test_the_document_has_this_table() -> None:
    """Every cell of it is one of these, and the other way round."""
    text = (ROOT / "docs" / "api.md").read_text()
    head, _, *rows = re.search(r"^\| way \|.*?(?=\n\n)", text, re.M | re.S)[0].splitlines()  # type: ignore[index]
    columns = [cell.strip() for cell in head.strip("|").split("|")][1:]
    assert columns == list(SAMPLINGS)
    table = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in table] == list(WAYS)
    assert all(cell == "yes" for row in table for cell in row[1:])
