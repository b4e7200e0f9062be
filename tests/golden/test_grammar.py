"""Constrained sequences on a real model: of their grammar, and the same tokens wherever their KV is, at any
depth of the pipeline, after preemptions, on another worker, on several ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from support import golden
from support.engine_driver import EngineDriver, plain, play
from support.golden import Checkpoint
from support.random_residency import RandomResidency
from support.ranks import RankPool
from tokenizers import Tokenizer

from ellm.worker.api.config import SchedulerConfig
from ellm.worker.api.request import EngineRequest, SamplingParams

pytestmark = [pytest.mark.needs_module(name) for name in ("numba", "llguidance", "jsonschema")]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "maxLength": 9},
        "b": {"type": "array", "items": {"type": "integer", "minimum": -99, "maximum": 99}, "maxItems": 4},
        "c": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/flag"}]},
    },
    "required": ["a", "b", "c"],
    "additionalProperties": False,
    "$defs": {"flag": {"type": "boolean"}},
    "x-guidance": {"whitespace_pattern": ""},
}
GRAMMAR = json.dumps({"grammars": [{"json_schema": SCHEMA}]})  # as llguidance reads it
GREEDY = SamplingParams(temperature=0.0, max_tokens=60)
FREE = replace(GREEDY, ignore_eos=True)


def requests() -> list[EngineRequest]:
    """Constrained ones, greedy, drawn, penalised, biased; and free ones among them."""
    drawn = replace(GREEDY, temperature=1.2, seed=11, top_p=0.95, logprobs=1)
    penalised = replace(GREEDY, repetition_penalty=1.4, logit_bias=((40, 9.0), (50, -9.0)))
    kinds = (GREEDY, FREE, drawn, penalised, replace(drawn, seed=12), FREE)
    return [
        EngineRequest(
            f"r{i}",
            tuple(golden.prompt(9 + 7 * i, seed=i)),
            kind if kind is FREE else replace(kind, grammar=GRAMMAR),
        )
        for i, kind in enumerate(kinds)
    ]


@pytest.fixture(scope="module")
def want(checkpoint: Callable[[str], Checkpoint]) -> dict[str, list[int]]:
    """Each alone, one plan at a time."""
    executor = golden.executor(checkpoint("llama")[0], jit=True, num_blocks=200)
    driver = play(executor, requests(), plain(max_num_seqs=1, pipeline_depth=1))
    executor.close()
    return driver.streams


def test_outputs_are_of_the_grammar(
    checkpoint: Callable[[str], Checkpoint], want: dict[str, list[int]]
) -> None:
    import jsonschema

    tokenizer = Tokenizer.from_file(str(checkpoint("llama")[0] / "tokenizer.json"))
    matcher = golden.executor(checkpoint("llama")[0], jit=False).grammars
    assert matcher is not None
    ended = 0
    for request in requests():
        tokens = want[request.request_id]
        if request.sampling.grammar is None:
            assert len(tokens) == GREEDY.max_tokens
            continue
        if tokens[-1] == 257:
            ended += 1
            jsonschema.validate(json.loads(tokenizer.decode(tokens)), SCHEMA)
        else:
            assert len(tokens) == GREEDY.max_tokens
        assert matcher.compile(GRAMMAR).deep_copy().consume_tokens(tokens)
    assert ended >= 2


@pytest.mark.parametrize("depth", [1, 2])
def test_no_token_depends_on_residency(
    checkpoint: Callable[[str], Checkpoint], want: dict[str, list[int]], depth: int
) -> None:
    """Preempted, parked, cut, saved, loaded, streamed; and planned past the end of the grammar at depth 2."""
    folder = checkpoint("llama")[0]
    room = {"transient_blocks": 20, "host_bytes": 1 << 20}
    small = golden.executor(folder, jit=True, num_blocks=8, **room)
    driver = play(small, requests(), plain(max_num_seqs=8, max_step_tokens=96, pipeline_depth=depth))
    assert driver.streams == want
    assert driver.core.report(driver.now).num_preemptions > 0
    policies = ("adaptive", "full-swap") if depth == 2 else ("full-offload",)
    for policy in policies:
        again = play(small, requests(), SchedulerConfig(policy=policy, max_num_seqs=8, max_step_tokens=96))
        assert again.streams == want, policy
    scheduler = plain(max_num_seqs=8, max_step_tokens=96, pipeline_depth=depth)
    assert play(small, requests(), scheduler, RandomResidency(depth)).streams == want
    small.close()


def test_another_worker_goes_on_where_the_first_stopped(
    checkpoint: Callable[[str], Checkpoint], want: dict[str, list[int]]
) -> None:
    """It gets prompt and output; a place in the grammar is made of the output."""
    executor = golden.executor(checkpoint("llama")[0], jit=True)
    for cut in (1, 7, 20):
        driver = EngineDriver(executor.limits)
        driver.executor = executor  # type: ignore[assignment]
        for request in requests():
            output = want[request.request_id][:cut]
            if len(output) == cut and output[-1] != 257:
                driver.add(replace(request, output_ids=tuple(output), attempt=1))
        driver.run()
        assert driver.streams == {name: want[name] for name in driver.streams}
        assert len(driver.streams) > 3
    wrong = replace(requests()[0], request_id="wrong", output_ids=(5, 5))
    driver.add(wrong)
    driver.run()
    assert driver.outputs["wrong"][-1].error == ("invalid_value", "the output so far is not of the grammar")
    executor.close()


def test_ranks_obey_alike(
    ranks: RankPool, checkpoint: Callable[[str], Checkpoint], want: dict[str, list[int]]
) -> None:
    config = golden.config(checkpoint("llama")[0], jit=True, num_blocks=12, tensor_parallel_size=2)
    with ranks.group(config) as executor:
        assert executor.grammars is not None
        driver = play(executor, requests(), plain(max_num_seqs=8, max_step_tokens=96))
    assert ranks.ends == ["closed"]
    assert driver.streams == want
