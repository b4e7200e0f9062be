"""`ellm plan` from the command line: its report, its file, and each mistake as one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ellm.deploy import cli

SMALL = ("--num-requests", "20", "--kv-bytes", "6e9", "--tpot-slo-ms", "50", "--tp", "1")
TRIAL = {
    "rate",
    "load",
    "policy",
    "host_gb",
    "throughput_tok_s",
    "goodput_tok_s",
    "slo_attainment",
    "ttft_mean_s",
    "ttft_p99_s",
    "tpot_mean_s",
    "preemptions",
    "parks",
    "recomputed_per_output_token",
}
SIZING = {
    "tp",
    "weight_bytes",
    "pool_bytes",
    "kv_token_bytes",
    "capacity_tokens",
    "full_step_s",
    "slo_over_full_step",
    "pool_over_weights",
    "capacity_gain_limit",
    "requests_held",
    "running",
    "limited_by",
    "step_s",
    "bound_tok_s",
    "capacity_tok_s",
    "capacity_requests_s",
    "capacity_tok_s_per_gpu",
    "phi",
    "phi_tokens",
}


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(("plan", *words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def plan(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str) -> tuple[dict[str, Any], str]:
    path = tmp_path / "plan.json"
    code, out, err = run(capsys, *words, "--json", str(path))
    assert (code, err) == (0, "")
    result: dict[str, Any] = json.loads(path.read_text())
    return result, out


def test_the_file_holds_all_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result, out = plan(capsys, tmp_path, "llama2-13b", *SMALL, "--host-gb", "4")
    assert result["version"] == 1
    assert result["model"]["name"] == "llama2-13b"
    assert result["chosen"].keys() == SIZING
    assert [layout["sizing"] for layout in result["layouts"]] == [result["chosen"]]
    assert result["prices"]["literal_may_pay"] is False
    trials = result["trials"]
    assert all(trial.keys() == TRIAL for trial in trials)
    three = [("full-chunked", 0.0), ("adaptive", 0.0), ("adaptive", 4.0)]
    # Little memory leaves a step rows to spare: what they recompute for free is tried, too.
    partial = (f"literal({result['literal_ratio_with_link']:.2f}, stream=0.76)", 4.0)
    assert [(trial["policy"], trial["host_gb"]) for trial in trials] == [*three, partial, *three, partial]
    assert trials[4]["rate"] == pytest.approx(trials[0]["rate"] * 1.2 / 0.9)
    assert trials[0]["load"] == pytest.approx(trials[0]["rate"] / result["chosen"]["capacity_requests_s"])
    assert {one["topic"] for one in result["advice"]} >= {
        "layout",
        "what pays here",
        "partial caching",
        "host tier",
        "adaptive policy",
    }
    text = " ".join(out.split())
    for one in result["advice"]:
        assert " ".join(one["text"].split()) in text  # nothing is in the file alone


@pytest.mark.parametrize(
    ("words", "rate"),
    [(["--rate", "0.25"], 0.25), (["--load", "0.5"], None), (["--rate", "0.25", "--jobs", "2"], 0.25)],
)
def test_what_was_asked_for_is_what_is_tried(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], rate: float | None
) -> None:
    result, _ = plan(capsys, tmp_path, "llama2-13b", *SMALL, "--host-gb", "0", "--cv", "0", *words)
    expected = rate or 0.5 * result["chosen"]["capacity_requests_s"]
    assert [trial["policy"] for trial in result["trials"]] == ["full-chunked", "adaptive"]
    assert all(trial["rate"] == pytest.approx(expected) for trial in result["trials"])
    assert all(trial["goodput_tok_s"] > 0.0 for trial in result["trials"])


def test_a_checkpoint_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {
        "architectures": ["OPTForCausalLM"],
        "vocab_size": 50_272,
        "hidden_size": 2_048,
        "ffn_dim": 8_192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "max_position_embeddings": 2_048,
        "word_embed_proj_dim": 2_048,
        "dtype": "float16",
    }
    folder = tmp_path / "opt-1.3b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    words = (str(folder), "--tpot-slo-ms", "20", "--kv-bytes", "3e9", "--num-requests", "15", "--rate", "3")
    result, out = plan(capsys, tmp_path, *words, "--tp", "1,2")
    assert out.startswith("opt-1.3b on a100-80g: 1,316 million parameters, 2.6 GB in bfloat16, 196.6 kB")
    assert result["chosen"]["kv_token_bytes"] == 2 * 2 * 24 * 2_048
    assert [layout["tp"] for layout in result["layouts"]] == [1, 2]


def test_a_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{3 * i},{100 + i % 7},{20 + i % 5}\n" for i in range(60))
    trace.write_text(f"Timestamp,Request tokens,Response tokens\n{rows}")
    result, _ = plan(capsys, tmp_path, "llama2-13b", *SMALL, "--workload", str(trace), "--rate", "5")
    assert result["workload"]["output_tokens"] == pytest.approx(22.0)
    assert result["trials"][0]["rate"] == pytest.approx(5.0, rel=0.01)


def test_starved_memory_tries_partial_caching(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("qwen3-32b", "--tp", "1", "--kv-bytes", "6e8", "--tpot-slo-ms", "100", "--num-requests", "12")
    result, out = plan(capsys, tmp_path, *words, "--host-gb", "4", "--load", "1.2")
    assert result["prices"]["literal_with_link_may_pay"] is True
    literal = result["trials"][-1]
    assert literal["policy"].startswith("literal(")
    assert literal["throughput_tok_s"] > result["trials"][0]["throughput_tok_s"]
    assert "Partial caching: pays" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpt-5"], "known: llama2-13b"),
        (["llama2-13b", "--gpu", "tpu"], "known: a100-80g"),
        (["llama2-70b"], "llama2-70b cannot run on a100-80g at TP 1: "),
        (["llama2-13b", "--tp", "0"], "--tp takes whole numbers from 1 on"),
        (["llama2-13b", "--tp", "two"], "--tp takes whole numbers from 1 on"),
        (["llama2-13b", "--tp", "3"], "cannot run on a100-80g at TP 3: tp must divide the 40 KV heads"),
        (["llama2-13b", "--tpot-slo-ms", "5"], "no request of llama2-13b keeps 5 ms per token"),
        (["llama2-13b", "--tpot-slo-ms", "0"], "--tpot-slo-ms must be above 0"),
        (["llama2-13b", "--ttft-slo-ms", "-1"], "--ttft-slo-ms must be above 0"),
        (["llama2-13b", "--rate", "0"], "--rate must be above 0"),
        (["llama2-13b", "--rate", "1", "--load", "1"], "give one"),
        (["llama2-13b", "--host-gb", "-1"], "--host-gb must be at least 0"),
        (["llama2-13b", "--num-requests", "0"], "--num-requests must be at least 1"),
        (["llama2-13b", "--max-num-seqs", "0"], "--max-num-seqs must be at least 1"),
        (["llama2-13b", "--kv-bytes", "1e6"], "too few"),
        (["llama2-13b", "--workload", "nothing.csv"], "neither a file nor one of: sharegpt, leval"),
        (["llama2-13b", "--json", "/no/such/folder/x.json"], "there is no folder"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    model, *others = words
    code, out, err = run(capsys, model, *SMALL, *others)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_folder_without_a_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, str(tmp_path), *SMALL)
    assert code == 2
    assert "config.json is missing" in err
