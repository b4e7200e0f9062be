"""Each row is sampled with its own parameters, and as if it were alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ellm.kernels import dispatch
from ellm.worker.api.request import SamplingParams
from ellm.worker.engine.plan import NewSequence
from ellm.worker.model.sampler import Sampler
from ellm.worker.model.sequences import SequenceState

VOCAB = 60
EOS = 59
CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)
ROWS = [
    GREEDY,
    replace(GREEDY, logit_bias=((5, 50.0),)),
    replace(GREEDY, repetition_penalty=1.8, presence_penalty=0.5),
    replace(GREEDY, frequency_penalty=1.5),
    SamplingParams(temperature=0.7, seed=3),
    SamplingParams(temperature=1.3, seed=2**64 - 1, top_k=5),
    SamplingParams(temperature=0.9, seed=4, top_p=0.5, presence_penalty=1.0),
    SamplingParams(temperature=1.0, seed=4, min_p=0.2),
    SamplingParams(temperature=1.0, seed=5, min_tokens=9, logit_bias=((2, -1.0),)),
]


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(dispatch.select("cpu", jit=False, deterministic=False), VOCAB, CPU)


def state(
    sampling: SamplingParams, prompt: tuple[int, ...] = (), outputs: tuple[int, ...] = (), choice: int = 0
) -> SequenceState:
    return SequenceState(0, NewSequence(0, prompt, outputs, sampling, choice), (EOS,), VOCAB)


def logits(rows: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def states() -> list[SequenceState]:
    return [state(p, (1, 2, 3, 3, i), (4, 4, 5, 10 + i), i) for i, p in enumerate(ROWS)]


def test_a_row_does_not_feel_the_others(sampler: Sampler) -> None:
    values = logits(len(ROWS))
    index = [4 + i for i in range(len(ROWS))]
    together = sampler.sample(values, states(), index).tolist()
    for i, row in enumerate(states()):
        assert sampler.sample(values[i : i + 1], [row], [index[i]]).item() == together[i], ROWS[i]


def test_sampling_leaves_the_logits_as_they_were(sampler: Sampler) -> None:
    """Log-probabilities are of the model's own distribution and read after sampling."""
    values = logits(len(ROWS))
    kept = values.clone()
    sampler.sample(values, states(), [4] * len(ROWS))
    assert torch.equal(values, kept)


def test_penalties_count_prompt_and_output_apart(sampler: Sampler) -> None:
    """Repetition looks at both, presence and frequency at the output alone (as vLLM and OpenAI have it)."""
    prompt, outputs = (1, 2), (2, 3, 3)
    sampling = replace(GREEDY, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
    for token in range(5):
        # The other tokens set the mark that this one, penalised, must still reach.
        for value in (8.0, -8.0):
            expected = value
            if token in (1, 2, 3):
                expected = value / 2 if value > 0 else value * 2
            expected -= 0.5 * outputs.count(token) + 0.25 * (token in outputs)
            for margin, wins in ((-0.01, True), (0.01, False)):
                row = torch.full((1, VOCAB), -100.0)
                row[0, token] = value
                row[0, 40] = expected + margin
                picked = sampler.sample(row, [state(sampling, prompt, outputs)], [3]).item()
                assert (picked == token) == wins, (token, value, margin)


def test_new_tokens_are_counted(sampler: Sampler) -> None:
    row = torch.full((1, VOCAB), -100.0)
    row[0, 7], row[0, 8] = 1.0, 0.5
    sequence = state(replace(GREEDY, frequency_penalty=0.3))
    assert sequence.counts is not None
    picked = []
    for i in range(5):
        token = int(sampler.sample(row, [sequence], [i]).item())
        sequence.counts.add(token)
        picked.append(token)
    assert picked == [7, 7, 8, 7, 8]


def test_min_tokens_keep_the_end_away(sampler: Sampler) -> None:
    row = torch.zeros(1, VOCAB)
    row[0, EOS], row[0, 30], row[0, 31] = 9.0, 8.0, 7.0
    sequence = state(replace(GREEDY, min_tokens=3, stop_token_ids=(30,)))
    assert [sampler.sample(row, [sequence], [i]).item() for i in range(5)] == [31, 31, 31, EOS, EOS]


def test_noise_depends_on_seed_choice_and_index_alone(sampler: Sampler) -> None:
    values = logits(1)

    def draw(seed: int, choice: int, index: int) -> int:
        sampling = SamplingParams(temperature=1.5, seed=seed)
        return int(sampler.sample(values, [state(sampling, choice=choice)], [index]).item())

    assert draw(1, 0, 0) == draw(1, 0, 0)
    for vary in (
        [draw(s, 0, 0) for s in range(40)],
        [draw(1, c, 0) for c in range(40)],
        [draw(1, 0, i) for i in range(40)],
    ):
        assert len(set(vary)) > 5


def test_logprobs_are_given_to_those_who_ask(sampler: Sampler) -> None:
    asks = [None, 0, 3, None, 1]
    rows = [state(replace(GREEDY, logprobs=n)) for n in asks]
    values = logits(len(rows), seed=2)
    tokens = sampler.sample(values, rows, [0] * len(rows))
    asked = sampler.logprobs(values, tokens, rows)
    assert asked is not None
    scores = asked.read()
    assert sorted(scores) == [1, 2, 4]
    want = values.log_softmax(-1)
    for i, score in scores.items():
        assert score.logprob == pytest.approx(want[i].max().item(), abs=1e-6)
        assert score.rank == 1
        best = want[i].topk(asks[i] or 0)
        assert [t for t, _ in score.top] == best.indices.tolist()
        assert [p for _, p in score.top] == pytest.approx(best.values.tolist(), abs=1e-6)
    assert sampler.logprobs(values, tokens, [rows[0]] * len(rows)) is None


class OneHead:
    """A model whose hidden states are its logits; remembers how many rows it was asked for at once."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def forward(self, *_: object) -> Tensor:
        raise AssertionError("scoring a prompt runs no layer: its hidden states are given")

    def logits(self, hidden: Tensor) -> Tensor:
        self.rows.append(len(hidden))
        return hidden


def test_prompts_are_scored_in_slices(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "_slice_rows", 4)
    values = logits(11, seed=3)
    ids = tuple(range(11))
    model = OneHead()
    scores = sampler.score_prompt(model, values, ids, 2)
    assert model.rows == [4, 4, 3]
    want = values.log_softmax(-1)
    for i, score in enumerate(scores):
        assert score.logprob == pytest.approx(want[i, i].item(), abs=1e-6)
        assert score.rank == int((want[i] > want[i, i]).sum()) + 1
        assert len(score.top) == 2
    assert sampler.score_prompt(model, values[:0], (), 2) == ()
