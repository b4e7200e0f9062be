"""Tokenizers are read from folders of the forms that checkpoints have, or refused in one line."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.router_server import FOLDER

from ellm.router.simulated_tokenizer import simulated_tokenizer
from ellm.router.tokenizer import Tokenizer
from ellm.worker.api.errors import ConfigError, InvalidRequest


def test_the_bundled_one_says_what_transformers_says() -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(FOLDER), Tokenizer.load(FOLDER)
    for text in ("Hello, world!", "  spaces\n\n\tand tabs ", "你好 🎉 é", "", "<|eot|> inside"):
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, False) == theirs.decode(ids)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(chat) == rendered


def test_gpt2s_files_will_do(tmp_path: Path) -> None:
    vocab = {"</s>": 0, "<pad>": 1, "h": 2, "i": 3, "hi": 4, "Ġ": 5, "Ġhi": 6}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh i\nĠ hi\n")
    names = {"bos_token": {"content": "</s>"}, "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("hi hi") == [0, 4, 6]
    assert tokenizer.encode("hi hi", add_special_tokens=False) == [4, 6]
    assert tokenizer.decode([0, 4, 6, 1]) == "hi hi"
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("content", [None, "", "{}", '{"model": {"type": "Magic"}}'])
def test_a_broken_folder_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match="tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_broken_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        Tokenizer.load(tmp_path)


def test_long_texts_are_encoded_in_a_thread() -> None:
    tokenizer = Tokenizer.load(FOLDER)
    text = "a long text " * 2000
    assert asyncio.run(tokenizer.encode_async(text)) == tokenizer.encode(text)


def test_simulated_workers_have_one() -> None:
    tokenizer = simulated_tokenizer("simulated:overhead_s=0.01,vocab_size=300")
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode(tokenizer.encode("Hi 你好")) == "Hi 你好"
    assert tokenizer.decode([0, 299, 260]) == " t299 t260"
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "user: x\nassistant:"
    assert simulated_tokenizer("simulated:").vocab_size == 32_000


def test_the_router_is_light() -> None:
    """What one router replica loads before it serves: no torch, no transformers, no Ray."""
    program = (
        "import sys, psutil, ellm.router.app as a, pathlib\n"
        f"a.Tokenizer.load(pathlib.Path({str(FOLDER)!r}))\n"
        "print([m for m in ('torch', 'transformers', 'ray', 'numpy') if m in sys.modules])\n"
        "print(psutil.Process().memory_info().rss >> 20)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded, mib = done.stdout.splitlines()
    assert loaded == "[]"
    assert int(mib) < 120
