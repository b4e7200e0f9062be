"""What the sides of a comparison have in common: the same bytes of KV, the same limits, each in its words."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ellm.loadtest.bench_checkpoint import with_tokenizer
from ellm.loadtest.peer_servers import (
    Setting,
    ellm_words,
    kv_token_bytes,
    num_blocks_in,
    vllm_environment,
    vllm_words,
)

CONFIG = {
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
}
TOKEN = 2 * 8 * 2 * 64 * 4  # keys and values, layers, heads, their size, float32


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_bytes_of_a_token(checkpoint: Path) -> None:
    assert kv_token_bytes(checkpoint, "float32") == TOKEN
    assert kv_token_bytes(checkpoint, "bfloat16") == TOKEN // 2


def test_head_size_and_kv_heads_by_themselves(tmp_path: Path) -> None:
    config = {**CONFIG, "head_dim": 128}
    del config["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert kv_token_bytes(tmp_path, "float32") == 2 * 8 * 8 * 128 * 4


def test_a_block_that_does_not_fit_whole_is_left_out() -> None:
    assert num_blocks_in(10 * 32 * TOKEN, 32, TOKEN) == 10
    assert num_blocks_in(11 * 32 * TOKEN - 1, 32, TOKEN) == 10


def value_after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_sides_can_use_the_same_bytes(checkpoint: Path, dtype: str) -> None:
    setting = Setting(checkpoint, dtype, 2, kv_bytes=100 * 32 * TOKEN, block_size=32)
    ours, theirs = ellm_words(setting, 8000), vllm_words(setting, 8001)
    blocks = 100 if dtype == "float32" else 200
    assert value_after(ours, "--kv-blocks") == str(blocks)
    # vLLM keeps its first block for itself.
    assert value_after(theirs, "--num-gpu-blocks-override") == str(blocks + 1)
    assert "worker.cache.block_size=32" in ours
    assert value_after(theirs, "--block-size") == "32"


def test_both_sides_have_the_same_limits(checkpoint: Path) -> None:
    setting = Setting(checkpoint, "float32", 2, 2**28, max_num_seqs=17, max_step_tokens=300)
    ours, theirs = ellm_words(setting, 8000), vllm_words(setting, 8001)
    assert {"worker.scheduler.max_num_seqs=17", "worker.scheduler.max_step_tokens=300"} < set(ours)
    assert {"worker.scheduler.watermark=0", "worker.cache.prefix_caching=false"} < set(ours)
    assert value_after(theirs, "--max-num-seqs") == "17"
    assert value_after(theirs, "--max-num-batched-tokens") == "300"
    assert "--no-enable-prefix-caching" in theirs


@pytest.mark.parametrize(("threads", "bound"), [(1, "1"), (2, "1,3")])
def test_vllm_is_bound_to_as_many_cores(
    checkpoint: Path, threads: int, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 1, 5})
    environment = vllm_environment(Setting(checkpoint, "float32", threads, 3 * 2**29), checkpoint)
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == bound
    assert int(environment["VLLM_CPU_KVCACHE_SPACE"]) * 2**30 >= 3 * 2**29
    assert "OMP_NUM_THREADS" not in environment


def test_the_checkpoint_gets_a_tokenizer_with_as_many_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from ellm.loadtest.bench_checkpoint import SHAPE

    folder = with_tokenizer(tmp_path)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() == SHAPE["vocab_size"]
