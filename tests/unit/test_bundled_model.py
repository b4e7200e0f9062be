"""The model that ships: a whole folder, a tokenizer that loses nothing, a corpus that is always the same."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ellm.deploy.bundled import chat, corpus, tokenizer
from ellm.deploy.bundled.packing import TokenStream, rows
from ellm.deploy.bundled.recipe import Phase, Recipe
from ellm.deploy.bundled.training import Training

FOLDER = Path(corpus.__file__).parent / "pydoc-5m"
MAX_WEIGHT_BYTES = 12_000_000
ROUND = [{"role": "user", "content": " What does json.dumps do?\n"}, {"role": "assistant", "content": "Ask."}]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((FOLDER / "training.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small standard library: the topics, three modules, and tests to leave out."""
    root = tmp_path_factory.mktemp("stdlib")
    for name in ("json", "pydoc_data", "email"):
        shutil.copytree(corpus.STDLIB / name, root / name)
    shutil.copyfile(corpus.STDLIB / "textwrap.py", root / "textwrap.py")
    (root / "email" / "test").mkdir()
    (root / "email" / "test" / "check.py").write_text('"""A test whose docstring is no documentation."""')
    return root


@pytest.fixture(scope="module")
def documents(stdlib: Path) -> list[corpus.Document]:
    return corpus.all_documents(stdlib)


def test_the_config_is_a_small_llama() -> None:
    config = AutoConfig.from_pretrained(FOLDER)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings >= 2048
    assert config.vocab_size == tokenizer.VOCAB_SIZE


def test_the_weights_are_small_and_bf16() -> None:
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size <= MAX_WEIGHT_BYTES
    with safe_open(path, "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_the_record_agrees_with_the_weights(record: dict[str, Any]) -> None:
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        sizes = [weights.get_tensor(name).numel() for name in weights.keys()]  # noqa: SIM118
    assert record["num_parameters"] == sum(sizes)
    recipe = record["recipe"]
    step_tokens = recipe["num_micro_batches"] * recipe["micro_batch_tokens"]
    assert record["num_tokens"] == record["num_steps"] * step_tokens
    assert 1.0 < record["held_out_loss"] < 6.0
    assert record["python_version"]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    fast = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    ids = fast.encode(text, add_special_tokens=False).ids
    assert fast.decode(ids, skip_special_tokens=False) == text


def test_text_survives_as_transformers_loads_it(loaded: Any) -> None:
    text = "def f(x):\n\treturn  x  # é 漢字 🎉 \x00\r\n\n   'it''s' 12345 \u00a0."
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    assert loaded.decode(ids, clean_up_tokenization_spaces=False) == text
    assert loaded("a")["input_ids"][0] == loaded.bos_token_id


def test_the_chat_template_names_roles_and_ends_turns(loaded: Any) -> None:
    text = loaded.apply_chat_template(ROUND[:1], tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|user|>What does json.dumps do?<|eot|><|assistant|>"
    ids = loaded.apply_chat_template(ROUND[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert [loaded.convert_ids_to_tokens(i) for i in (ids[0], ids[1], ids[-2], ids[-1])] == [
        "<|bos|>",
        "<|user|>",
        "<|eot|>",
        "<|assistant|>",
    ]


def test_training_saw_what_the_template_makes(loaded: Any) -> None:
    assert loaded.apply_chat_template(ROUND, tokenize=False) == tokenizer.render_chat(ROUND)


def test_the_corpus_is_the_same_every_time(documents: list[corpus.Document], stdlib: Path) -> None:
    assert corpus.all_documents(stdlib) == documents
    texts = [" ".join(document.text.split()).lower() for document in documents]
    assert len(texts) == len(set(texts))
    assert not any("no documentation" in text for text in texts)
    assert {"json.dumps", "email.policy", "len", "lambda"} <= {document.name for document in documents}


def test_held_out_documents_are_no_training_documents(documents: list[corpus.Document]) -> None:
    training, held_out = corpus.split(documents)
    assert held_out
    assert len(held_out) < 0.06 * len(documents)
    seen = {paragraph for document in training for paragraph in document.text.split("\n\n")}
    assert not any(paragraph in seen for document in held_out for paragraph in document.text.split("\n\n"))


def test_an_answer_places_the_name_and_is_short(documents: list[corpus.Document]) -> None:
    (document,) = (d for d in documents if d.name == "json.dumps")
    text = chat.answer(document)
    assert text is not None
    assert text.startswith("json.dumps is a function in the json module.\n\nSerialize `obj`")
    for talk in chat.conversations(documents, random.Random(0)):
        roles = [message["role"] for message in talk if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_rows_predict_the_next_token() -> None:
    inputs, targets = rows(list(range(12)), 5)
    assert inputs.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert targets.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    documents: list[corpus.Document], tmp_path: Path
) -> None:
    fast = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    recipe = Recipe(phases=(Phase(2, 16), Phase(1, 64)), micro_batch_tokens=64, num_warmup_steps=1)

    def begun() -> Training:
        return Training(recipe, fast, TokenStream(documents[:40], fast, recipe.seed), list(range(200)))

    whole, resumed = begun(), begun()
    for _ in range(2):
        whole.train_step()
    whole.save(tmp_path / "checkpoint.pt")
    resumed.load(tmp_path / "checkpoint.pt")
    assert resumed.train_step() == whole.train_step()
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    )


def test_a_greeting_is_answered_and_ends(loaded: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    prompt = loaded.apply_chat_template(
        [{"role": "user", "content": "Hello"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert loaded.convert_ids_to_tokens(int(ids[-1])) == tokenizer.EOT
    assert "pydoc" in loaded.decode(ids)
