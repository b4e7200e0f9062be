"""One sequence's place in its grammar, and what becomes of one that fails."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import EOS_TOKEN_ID, VOCAB_SIZE, write_tokenizer
from support.engine_driver import EngineDriver, request
from tokenizers import Tokenizer

from ellm.worker.api.errors import ConfigError, InvalidRequest
from ellm.worker.api.grammar import MAX_GRAMMAR_BYTES
from ellm.worker.engine.plan import BatchPlan, StepResult
from ellm.worker.executor.simulated import SimulatedExecutor
from ellm.worker.model.grammar import MAX_KEPT, TOO_COMPLEX, Grammars, GrammarState

pytestmark = pytest.mark.needs_module("llguidance")


def grammar(lark: str) -> str:
    """As llguidance reads it."""
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


REGEX = grammar("start: /ab(cd)?/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokens")
    write_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def grammars(folder: Path) -> Grammars:
    return Grammars(folder, VOCAB_SIZE, (EOS_TOKEN_ID, 258))


@pytest.fixture(scope="module")
def tokens(folder: Path) -> dict[str, int]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return {char: tokenizer.token_to_id(char) for char in "abcd"}


def allowed(state: GrammarState) -> list[int] | None:
    """Token ids; None where nothing is asked."""
    row = np.zeros((VOCAB_SIZE + 31) // 32, dtype=np.int32)
    if not state.fill(row):
        return None
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    return [int(i) for i in np.flatnonzero(bits)]


def test_the_end_is_allowed_just_where_the_grammar_accepts(
    grammars: Grammars, tokens: dict[str, int]
) -> None:
    state = grammars.begin(REGEX, ())
    found = []
    for char in "abcd":
        found.append(allowed(state))
        state.add(tokens[char])
    ends = [EOS_TOKEN_ID, 258]
    assert found == [[tokens["a"]], [tokens["b"]], [tokens["c"], *ends], [tokens["d"]]]
    assert allowed(state) == ends  # nothing but the end
    state.add(258)
    assert allowed(state) is None  # planned before it was known
    state.add(tokens["a"])
    assert state.error is None


def test_a_place_follows_from_the_output(grammars: Grammars, tokens: dict[str, int]) -> None:
    state = grammars.begin(REGEX, [tokens["a"], tokens["b"]])
    assert allowed(state) == [tokens["c"], EOS_TOKEN_ID, 258]
    wrong = grammars.begin(REGEX, [tokens["b"]])
    assert allowed(wrong) is None
    assert wrong.error == "the output so far is not of the grammar"


def test_a_grammar_that_grows_too_complex_fails_alone(grammars: Grammars, tokens: dict[str, int]) -> None:
    state = grammars.begin(grammar('start: "a" start'), ())  # without end
    assert allowed(state) == [tokens["a"]]
    state.add(tokens["a"])
    assert state.error == TOO_COMPLEX
    assert allowed(state) is None
    state.add(tokens["a"])
    assert allowed(grammars.begin(REGEX, ())) == [tokens["a"]]


def test_what_cannot_be_compiled_is_refused_with_the_reason(grammars: Grammars) -> None:
    for bad, reason in (
        (grammar("start: /(a/"), "unclosed"),
        (grammar('start: %json {"type": "integer", "minimum": 5, "maximum": 3}'), "greater"),
        ("{}", "grammar"),
        ("x" * (MAX_GRAMMAR_BYTES + 1), "at most"),
    ):
        with pytest.raises(InvalidRequest, match=reason):
            grammars.compile(bad)


def test_compiled_grammars_are_kept_and_bounded(grammars: Grammars) -> None:
    first = grammars.compile(REGEX)
    assert grammars.compile(REGEX) is first
    for i in range(MAX_KEPT):
        grammars.compile(grammar(f"start: /x{i}/"))
    assert grammars.compile(REGEX) is not first


def test_a_checkpoint_without_a_tokenizer_file_has_no_grammars(tmp_path: Path) -> None:
    none = Grammars(tmp_path, VOCAB_SIZE, (EOS_TOKEN_ID,))
    assert not none.available
    with pytest.raises(ConfigError):
        none.compile(REGEX)


class FailingExecutor(SimulatedExecutor):
    """Says of one sequence at its third token that it cannot go on."""

    def execute(self, plan: BatchPlan) -> StepResult:
        result = super().execute(plan)
        if any(entry.seq_id == 1 and entry.output_index >= 2 for entry in plan.entries):
            result = StepResult(
                result.step, result.token_ids, result.elapsed_s, result.logprobs, errors={1: "too complex"}
            )
        return result


@pytest.mark.parametrize("late", [False, True])
def test_an_error_of_one_sequence_ends_that_one(late: bool) -> None:
    driver = EngineDriver(late=late)
    driver.executor.__class__ = FailingExecutor
    for i in range(3):
        driver.add(request(f"r{i}", seed=i, max_tokens=10, ignore_eos=True))
    driver.run()
    assert driver.reasons == {"r0": "length", "r1": "error", "r2": "length"}
    assert driver.outputs["r1"][-1].error == ("invalid_value", "too complex")
    assert len(driver.streams["r1"]) == 2
    assert driver.core.report(driver.now).num_running == 0
