"""Features of a request with those of a model and its ranks that no other file has together."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from support import golden
from support.engine_driver import plain, play
from support.golden import Checkpoint
from support.random_residency import RandomResidency
from support.ranks import RankPool

from ellm.worker.api.request import EngineRequest, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 30}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_pattern": ""},
}
GRAMMAR = json.dumps({"grammars": [{"json_schema": SCHEMA}]})


def test_a_prompt_is_scored_by_ranks_as_by_one(
    ranks: RankPool, checkpoint: Callable[[str], Checkpoint]
) -> None:
    """As `echo` with `logprobs` asks for it, in chunks."""
    folder, _ = checkpoint("llama-8-heads")
    sampling = SamplingParams(temperature=0.0, max_tokens=2, logprobs=2, prompt_logprobs=2, ignore_eos=True)
    requests = [EngineRequest(f"r{i}", tuple(golden.prompt(20 + 9 * i, seed=i)), sampling) for i in range(3)]
    alone = golden.executor(folder, jit=False, num_blocks=200)
    want = play(alone, requests, plain(max_num_seqs=1)).outputs
    alone.close()
    config = golden.config(folder, jit=False, num_blocks=200, tensor_parallel_size=2)
    with ranks.group(config) as executor:
        got = play(executor, requests, plain(max_num_seqs=4, max_step_tokens=16)).outputs
    for request in requests:
        ours, theirs = got[request.request_id][0], want[request.request_id][0]
        assert ours.prompt_logprobs is not None
        assert theirs.prompt_logprobs is not None
        assert len(ours.prompt_logprobs) == len(request.prompt_ids)
        assert ours.prompt_logprobs[0] is None
        for one, other in zip(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True):
            assert one is not None
            assert other is not None
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.needs_module("numba")
@pytest.mark.needs_module("llguidance")
def test_a_grammar_holds_where_attention_has_a_window(checkpoint: Callable[[str], Checkpoint]) -> None:
    """And the same tokens come wherever the KV is."""
    folder, _ = checkpoint("mistral-window")
    sampling = SamplingParams(temperature=0.9, seed=4, max_tokens=60, grammar=GRAMMAR)
    requests = [EngineRequest(f"r{i}", tuple(golden.prompt(30 + 11 * i, seed=i)), sampling) for i in range(4)]
    room = {"transient_blocks": 20, "host_bytes": 1 << 20}
    alone = golden.executor(folder, jit=True, num_blocks=200)
    want = play(alone, requests, plain(max_num_seqs=1)).streams
    alone.close()
    small = golden.executor(folder, jit=True, num_blocks=12, **room)
    got = play(small, requests, plain(max_num_seqs=4, max_step_tokens=96), RandomResidency(1)).streams
    small.close()
    assert got == want
    assert len({len(stream) for stream in want.values()}) > 1
