"""Logits and greedy tokens of every architecture against transformers on the same checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import transformers
from support import golden
from support.golden import CASES, Checkpoint
from support.plans import GREEDY, PlanDriver

from ellm.worker.executor.local import LocalExecutor

BODIES = ["torch", pytest.param("numba", marks=pytest.mark.needs_module("numba"))]
VOCAB = 320


@pytest.fixture(scope="module", params=BODIES)
def body(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def executor(
    case: str, body: str, checkpoint: Callable[[str], Checkpoint]
) -> Iterator[tuple[LocalExecutor, Checkpoint]]:
    made = checkpoint(case)
    engine = golden.executor(made[0], jit=body == "numba")
    yield engine, made
    engine.close()


def distributions(engine: LocalExecutor, ids: list[int], chunk: int) -> torch.Tensor:
    """[len(ids) - 1, V]: the whole distribution after each position, from prompt log-probabilities."""
    driver = PlanDriver(engine)
    track = driver.add(1, ids, replace(GREEDY, prompt_logprobs=VOCAB, logprobs=VOCAB))
    driver.generate(1, 1, chunk)
    scores = [s for r in track.results for s in (r.prompt_logprobs or {}).get(1, ())]
    out = torch.empty(len(scores), VOCAB)
    for i, score in enumerate(scores):
        assert len(score.top) == VOCAB
        tokens, logprobs = zip(*score.top, strict=True)
        out[i, list(tokens)] = torch.tensor(logprobs)
    driver.release(1)
    driver.add(2, [0])
    driver.generate(2, 1)  # lets the executor know
    return out


@pytest.mark.parametrize("chunk", [37, 120])
def test_prefill_distributions_are_close(executor: tuple[LocalExecutor, Checkpoint], chunk: int) -> None:
    engine, (_, model) = executor
    ids = golden.prompt(120, seed=1)
    want = golden.log_softmax(model, ids)[:-1]
    got = distributions(engine, ids, chunk)
    assert got.shape == want.shape
    assert (got - want).abs().max() < 1e-4


def test_greedy_tokens_are_equal_in_mixed_batches(executor: tuple[LocalExecutor, Checkpoint]) -> None:
    """Three sequences that start at different steps, prefilled by chunks beside each other's decodes."""
    engine, (_, model) = executor
    prompts = {1: golden.prompt(70, 11), 2: golden.prompt(5, 12), 3: golden.prompt(33, 13)}
    num_tokens = 30
    driver = PlanDriver(engine)
    chunks = {1: 19, 2: 5, 3: 16}
    for step in range(200):
        for seq_id in prompts:
            if step == 2 * (seq_id - 1):
                driver.add(seq_id, prompts[seq_id])
        rows = {}
        for seq_id, track in driver.tracks.items():
            if len(track.outputs) < num_tokens:
                rows[seq_id] = min(chunks[seq_id], len(track.tokens) - track.computed)
        if not rows:
            break
        driver.step(rows)
    for seq_id, ids in prompts.items():
        assert driver.tracks[seq_id].outputs == golden.greedy(model, ids, num_tokens), seq_id


def test_bfloat16_is_as_exact_as_transformers(
    case: str, body: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    """The yardstick is float32 arithmetic on weights rounded to bfloat16. Our distributions lie as near to
    it as transformers' bfloat16 does; a greedy token is the yardstick's wherever that error does not reach
    from one token to the next, and nearly everywhere."""
    folder, model = checkpoint(case)
    engine = golden.executor(folder, jit=body == "numba", dtype="bfloat16")
    ids = golden.prompt(50, seed=5)
    driver = PlanDriver(engine)
    driver.add(1, ids)
    outputs = driver.generate(1, 32, chunk=20)
    tokens = ids + outputs
    ours = distributions(engine, tokens, chunk=41)
    engine.close()
    exact = golden.log_softmax(rounded(model), tokens)[:-1]
    # Read anew: `to` would round the rotary frequencies as well, which stay float32 in both engines.
    bfloat16 = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    our_error, their_error = ours - exact, golden.log_softmax(bfloat16, tokens)[:-1] - exact
    assert our_error.square().mean().sqrt() < 1.1 * their_error.square().mean().sqrt()
    scores = exact[len(ids) - 1 :]
    chosen = scores.gather(1, torch.tensor(outputs).unsqueeze(1)).squeeze(1)
    missed = scores.max(-1).values - chosen
    assert missed.max() < their_error.abs().max()
    assert (missed == 0).float().mean() > 0.8
    assert len(set(outputs)) > 2


def rounded(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The same with weights of bfloat16, in float32."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return model
