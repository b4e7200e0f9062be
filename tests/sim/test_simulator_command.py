"""`ellm simulate` from the command line: its files, its table, and each mistake as one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ellm.deploy import cli

SMALL = ("simulate", "--num-requests", "20", "--kv-bytes", "6e9", "--rate", "2", "--tpot-slo-ms", "30")
FIGURES = {
    "throughput_tok_s",
    "goodput_tok_s",
    "slo_attainment",
    "goodput_strict_tok_s",
    "slo_attainment_strict",
    "ttft_mean_s",
    "ttft_p50_s",
    "ttft_p99_s",
    "tpot_mean_s",
    "tpot_p99_s",
    "preemptions",
    "recomputed_per_output_token",
    "uncached_ratio_mean",
}


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def simulate(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str) -> dict[str, Any]:
    path = tmp_path / "out.json"
    code, _, err = run(capsys, *SMALL, *words, "--json", str(path))
    assert (code, err) == (0, "")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_the_file_holds_what_it_promises(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = ["full-chunked", "full-recompute(max_num_seqs=4,watermark=0.05)"]
    result = simulate(capsys, tmp_path, "--policy", ",".join(names), "--seed", "3")
    assert list(result["policies"]) == names
    requests = result["requests"]
    assert len(requests["prompt_tokens"]) == len(requests["output_tokens"]) == 20
    assert result["bound_tok_s"] > 0
    for figures in result["policies"].values():
        assert figures.keys() >= FIGURES
        assert all(isinstance(figures[key], int | float) for key in FIGURES)
        assert 0.0 <= figures["slo_attainment"] <= 1.0
        assert 0.0 <= figures["goodput_tok_s"] <= figures["throughput_tok_s"] < result["bound_tok_s"]
        tokens = figures["throughput_tok_s"] * figures["duration_s"]
        assert tokens == pytest.approx(sum(requests["output_tokens"]))
    assert result["setting"]["model"] == "llama2-13b"
    assert result["policies"][names[0]] != result["policies"][names[1]]


def test_seeds_are_averaged_and_processes_change_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    both = simulate(capsys, tmp_path, "--policy", "full-chunked", "--seed", "1,2", "--jobs", "2")
    single = [
        simulate(capsys, tmp_path, "--policy", "full-chunked", "--seed", seed)["policies"]["full-chunked"]
        for seed in ("1", "2")
    ]
    for key in FIGURES:
        assert [run["policies"]["full-chunked"][key] for run in both["runs"]] == [one[key] for one in single]
        mean = both["policies"]["full-chunked"][key]
        assert mean == pytest.approx((single[0][key] + single[1][key]) / 2)
    assert both["policies"]["full-chunked"]["goodput_stdev_tok_s"] > 0.0


def test_the_table_names_policies_bound_and_limits(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *SMALL, "--policy", "full-chunked", "--host-gb", "1")
    assert code == 0
    for text in ("full-chunked", "goodput", "bound", "max_num_seqs 256", "watermark 0.01", "host 1 GB"):
        assert text in out


@pytest.mark.needs_module("matplotlib")
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"out.{kind}"
    assert run(capsys, *SMALL, "--policy", "full-chunked", "--plot", str(path))[0] == 0
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    assert path.stat().st_size > 10_000


def test_without_matplotlib_it_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run(capsys, *SMALL, "--plot", str(tmp_path / "out.png"))
    assert (code, out) == (2, "")
    assert err == "ellm simulate: --plot needs matplotlib: pip install 'ellm-on-ray[plot]'\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tpot-slo-ms", "0"], "--tpot-slo-ms must be above 0, not 0"),
        (["--tpot-slo-ms", "nan"], "--tpot-slo-ms must be above 0"),
        (["--ttft-slo-ms", "-1"], "--ttft-slo-ms must be above 0"),
        (["--rate", "-3"], "--rate must be above 0, not -3"),
        (["--load", "0.5"], "give one"),
        (["--cv", "-1"], "--cv must be at least 0"),
        (["--num-requests", "0"], "--num-requests must be at least 1"),
        (["--model", "gpt-5"], "known: llama2-13b, llama2-70b, llama3-8b, opt-13b, opt-30b, qwen3-32b"),
        (["--gpu", "tpu"], "known: a100-80g"),
        (["--model", "llama2-70b"], "raise --tp"),
        (["--tp", "7"], "tp must divide"),
        (["--kv-bytes", "0"], "--kv-bytes must be above 0"),
        (["--kv-bytes", "1e12"], "beside the weights"),
        (["--kv-bytes", "1e6"], "too few"),
        (["--host-gb", "-1"], "--host-gb must be at least 0"),
        (["--policy", "fastest"], "unknown policy 'fastest'; known:"),
        (["--policy", "full-chunked(max_num_seqs=none)"], "max_num_seqs must be a whole number"),
        (["--policy", "full-chunked(max_num_seqs=0)"], "max_num_seqs must be at least 1"),
        (["--policy", ""], "not of the form NAME"),
        (["--seed", "1,x"], "--seed takes whole numbers"),
        (["--seed", "-1"], "--seed takes whole numbers"),
        (["--workload", "nothing.csv"], "neither a file nor one of: sharegpt, leval"),
        (["--json", "/no/such/folder/x.json"], "there is no folder"),
        (["--block-size", "0"], "block size"),
        (["--watermark", "1.5"], "watermark must be"),
        (["--transient-blocks", "-1"], "--transient-blocks must be at least 0"),
        (["--transient-blocks", "100000"], "leave no room"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    code, out, err = run(capsys, *SMALL, "--policy", "full-chunked", *words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_neither_rate_nor_load(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "simulate", "--num-requests", "5")
    assert code == 2
    assert "give --rate (requests per second) or --load (share of capacity)" in err


def test_a_trace_keeps_its_own_times(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.csv", tmp_path / "out.json"
    rows = "".join(f"{3 * i},{100 + i},{20 + i}\n" for i in range(30))
    trace.write_text(f"Timestamp,Request tokens,Response tokens\n{rows}")
    words = ("simulate", "--workload", str(trace), "--num-requests", "10", "--policy", "full-chunked")
    assert run(capsys, *words, "--seed", "0", "--json", str(out))[0] == 0
    requests = json.loads(out.read_text())["requests"]
    assert requests["arrival_s"] == [3.0 * i for i in range(10)]
    assert requests["prompt_tokens"] == [100 + i for i in range(10)]
    assert run(capsys, *words, "--seed", "0", "--rate", "2", "--json", str(out))[0] == 0
    assert json.loads(out.read_text())["requests"]["arrival_s"][-1] == 5.0
