"""What waits for a GPU runs here in its small form, and needs nothing that a GPU machine may lack."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tree import ROOT

from ellm.loadtest.gpu import ablation, attention, engine, ranks, starved, strict, summary
from ellm.loadtest.gpu.models import SHAPES, make_model, work_of
from ellm.loadtest.gpu.timing import aim, beside
from ellm.loadtest.starved_rounds import has_time
from ellm.worker.model.inspect import check_weights, read_architecture

SCRIPTS = sorted(
    path.stem
    for path in Path(ablation.__file__).parent.glob("*.py")
    if path.stem not in ("__init__", "timing")
)
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "numba", "fastapi", "uvicorn", "openai", "grpc"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import importlib
for name in sys.argv[1:]:
    importlib.import_module("ellm.loadtest.gpu." + name)
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # profiles of steps


def result(module: Any, folder: Path, *arguments: str) -> dict[str, Any]:
    out = folder / "out.json"
    common = ["--device", "cpu", "--tiny", "--models", str(folder), "--out", str(out)]
    module.main([*common, *arguments])
    found: dict[str, Any] = json.loads(out.read_text())
    assert found["torch"] == torch.__version__
    assert found["arguments"]["device"] == "cpu"
    return found


def test_scripts_need_nothing_that_a_gpu_machine_may_lack() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *SCRIPTS], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


BARE = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
missing = {"ray", "numba", "fastapi", "openai", "grpc", "hypothesis", "pytest_timeout", "schemathesis"}
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.partition(".")[0] in missing else find(name, *rest)
)
import pytest
sys.exit(pytest.main([*sys.argv[1:], "--collect-only"]))
"""


def test_golden_tests_need_pytest_and_none_of_its_plugins() -> None:
    checks = (Path(ablation.__file__).parent / "checks.sh").read_text()
    words = checks.partition("-m pytest")[2].partition("tests/golden")[0].replace("\\\n", " ").split()
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [sys.executable, "-c", BARE, *words, "tests/golden"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for name in ("test_strict.py", "test_holes.py"):
        assert name in done.stdout


def test_every_script_is_part_of_the_checks() -> None:
    checks = (Path(ablation.__file__).parent / "checks.sh").read_text()
    parts = ("observed", "attention_peers")
    assert [name for name in SCRIPTS if name not in parts and name not in checks] == []
    results = set(re.findall(r"\$OUT/([a-z0-9.-]+)\.json", checks)) - {"summary"}
    loops = ("attention", "fusion", "kernels", "graphs", "host_copies", "steps")
    loops += ("ablation", "ranks", "strict")
    models = (f"engine-{name}" for name in ("qwen3-0.6b", "llama-3-8b"))
    assert results | {*loops, *models} == set(summary.EXPECTED)
    assert f"for name in {' '.join(loops[:6])}; do" in checks


def test_models_are_what_they_are_called(tmp_path: Path) -> None:
    folder = make_model("tiny", tmp_path)
    check_weights(folder, read_architecture(folder))
    before = (folder / "model-00001.safetensors").stat().st_mtime_ns
    make_model("tiny", tmp_path)
    assert (folder / "model-00001.safetensors").stat().st_mtime_ns == before, "written once"
    for name, parameters in (("llama-3-8b", 7.5e9), ("qwen3-0.6b", 0.596e9)):
        target = tmp_path / name
        target.mkdir()
        (target / "config.json").write_text(json.dumps(SHAPES[name]))
        work = work_of(target)
        assert work.matrix_elements == pytest.approx(parameters, rel=0.01)
    assert work.kv_token_bytes == 2 * 2 * 28 * 8 * 128
    assert work.decode_bytes(8, 100.0) == 2 * work.matrix_elements + 800 * work.kv_token_bytes
    assert work.prefill_flops(2, 64) > 2 * 64 * 2 * (work.matrix_elements - 151936 * 1024)


@pytest.mark.needs_module("numba")
def test_the_engines_speed(tmp_path: Path) -> None:
    """Also with STRICT: what it costs is said in its place."""
    found = result(engine, tmp_path, "--vllm-python", "/nowhere/python", "--strict")
    (model,) = found["models"]
    assert [(row["side"], row["batch"]) for row in model["rows"]] == [("ellm", 1), ("ellm", 3)]
    for row in model["rows"]:
        assert min(row[k] for k in ("decode_tok_s", "prefill_tok_s", "decode_share", "prefill_share")) > 0.0
    (note,) = model["notes"]
    assert note.startswith("vLLM did not run: "), "what is beside ours may fail alone"
    kinds = ("decode", "prefill")
    assert [one["what"] for one in found["aims"]] == [
        f"tiny, batch {batch}: {kind}, STRICT over plain" for batch in (1, 3) for kind in kinds
    ]
    assert all(one["figure"] > 0.0 and one["least"] is None for one in found["aims"])


def test_another_engine_runs_by_itself(tmp_path: Path) -> None:
    """Its rows come to those of an earlier run."""
    ours = result(engine, tmp_path, "--only", "ellm")
    (before,) = ours["models"]
    found = result(engine, tmp_path, "--only", "vllm", "--vllm-python", "/nowhere/python")
    (after,) = found["models"]
    assert [row["decode_tok_s"] for row in after["rows"]] == [row["decode_tok_s"] for row in before["rows"]]
    assert before["notes"] == []
    assert after["notes"][0].startswith("vLLM did not run: ")


def test_aims_are_said_to_be_met_or_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"side": "ellm", "batch": 1, "decode_share": 0.8, "decode_over_vllm": 0.7, "prefill_over_vllm": 0.9},
        {"side": "vllm", "batch": 1, "decode_share": 0.9},
    ]
    made = engine.aims([{"model": "llama-3-8b", "rows": rows, "notes": []}])
    assert [(one["figure"], one["least"], one["met"]) for one in made] == [
        (0.8, 0.75, True),
        (0.7, 0.8, False),
        (0.9, 0.8, True),
    ]
    aims = [aim("decode", 0.8, 0.85), aim("prefill", 0.95, 0.9), beside("FlashInfer's", 1.25)]
    (tmp_path / "attention.json").write_text(json.dumps({"device": "H", "aims": aims}))
    (tmp_path / "steps.json").write_text(json.dumps({"device": "H", "notes": ["a note"]}))
    assert summary.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:4] == [
        "MISSED attention: decode: 0.8, at least 0.85",
        "met    attention: prefill: 0.95, at least 0.9",
        "beside attention: FlashInfer's: 1.25",
        "note   steps: a note",
    ]
    assert all(line.startswith("not measured ") for line in said[4:])
    assert json.loads((tmp_path / "summary.json").read_text())["lines"] == said
    assert summary.main([str(tmp_path / "empty")]) == 1


def test_what_was_not_measured_is_said_with_the_reason(tmp_path: Path) -> None:
    """A peer that is not there, a shape that was not run, a policy for which there was no time, a file that
    is missing or says nothing, a run without a GPU: nothing is left out in silence."""
    absent = {"flashinfer_absent": "FlashInfer is not installed", "served": True}
    decode = {"batch": 8, "context": 16384, "kv_mib": 512.0, "share_of_copy": 0.9, "ms": 2.0, **absent}
    prefill = {"tokens": 4096, "flash_over_ours": 0.85, **absent}
    prompt = {"tokens": 1, "flash_absent": "No available kernel", "flashinfer_over_ours": 1.5, "served": True}
    found = {
        "decode": [decode, decode | {"served": False}, decode | {"kv_mib": 9, "flashinfer_ms": 3.0}],
        "prefill": [prefill, prefill | {"served": False}, prompt],
    }
    told = [(one["what"], one["figure"], one["met"]) for one in attention.aims(found)]
    assert told == [
        ("decode 8x16384: share of the copy's rate", 0.9, True),
        ("decode 8x16384: beside FlashInfer", None, None),
        ("decode 8x16384: FlashInfer's time over ours", 1.5, None),
        ("prefill 4096: of FlashAttention", 0.85, False),
        ("prefill 4096: beside FlashInfer", None, None),
        ("prefill 1: of FlashAttention", None, None),
        ("prefill 1: FlashInfer's time over ours", 1.5, None),
    ]
    nothing = attention.aims({"decode": [decode | {"kv_mib": 9}], "prefill": []})
    reasons = ["FlashInfer is not installed", "no such shape was run", "no prompt was run"]
    assert [one["reason"] for one in nothing] == reasons
    row = {"side": "ellm", "batch": 8, "decode_share": 0.5}
    model = {"model": "llama-3-8b", "rows": [row], "notes": ["vLLM did not run: no such wheel"]}
    engines = engine.aims([model]) + engine.aims([{"model": "tiny", "rows": [row], "notes": []}])
    assert [one["figure"] for one in engines] == [None] * 5
    assert engines[0]["reason"] == "batch 1 was not run"
    assert {one["reason"] for one in engines[1:3]} == {"vLLM did not run: no such wheel"}
    assert "VLLM_PYTHON" in engines[3]["reason"]
    policies = starved.aims(
        {"runs": [{"policy": "adaptive", "step_errors": {}}], "left_out": ["literal(0.5)"]}
    )
    assert [(one["what"], one["figure"]) for one in policies] == [
        ("adaptive: cost model", None),
        ("literal(0.5): cost model", None),
    ]
    results = {
        "attention": {"device": "H", "aims": attention.aims(found)},
        "ranks": {"device": "interpreter", "aims": [aim("two ranks", 1, 1)]},
        "strict": {"device": "H", "aims": []},
        "fusion": {"device": "H"},
    }
    lines = summary.lines(results)
    assert "not measured attention: prefill 1: of FlashAttention: No available kernel" in lines
    assert "not measured ranks: two ranks: ran without a GPU" in lines
    assert [line for line in lines if " strict: " in line] == [
        f"not measured strict: {what}: strict.json says nothing of it" for what in summary.EXPECTED["strict"]
    ]
    assert not [line for line in lines if " fusion: " in line], "it has no aims"
    for name, whats in summary.EXPECTED.items():
        missing = [line for line in lines if line.startswith(f"not measured {name}: ")]
        if name not in results:
            assert missing == [
                f"not measured {name}: {what}: no {name}.json (failed or not run: see checks.log)"
                for what in whats
            ]


def test_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script itself compares tokens, and kills a rank."""
    found = result(ranks, tmp_path)
    assert [(row["variant"], row["tokens"]) for row in found["rows"]] == [("eager", 4 * 12)]
    assert found["death"]["reason"]
    assert [one["met"] for one in found["aims"]] == [True, True, None]
    capsys.readouterr()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "one")
    ranks.main(["--out", str(tmp_path / "one.json")])
    assert capsys.readouterr().out == "skipped: two ranks need 2 GPUs, this machine has 1\n"
    told = json.loads((tmp_path / "one.json").read_text())["aims"]
    assert [(one["figure"], one["reason"]) for one in told] == [
        (None, "two ranks need 2 GPUs, this machine has 1")
    ] * 3


def test_another_engine_is_put_beside_ours() -> None:
    rows: list[dict[str, Any]] = [
        {"side": "ellm", "batch": 8, "decode_tok_s": 90.0, "prefill_tok_s": 40.0},
        {"side": "vllm", "batch": 8, "decode_tok_s": 100.0, "prefill_tok_s": 20.0},
    ]
    engine.with_ratios(rows)
    assert (rows[0]["decode_over_vllm"], rows[0]["prefill_over_vllm"]) == (0.9, 2.0)
    assert "decode_over_vllm" not in rows[1]


def test_every_switch_alone(tmp_path: Path) -> None:
    """The script itself compares tokens and what ran."""
    found = result(ablation, tmp_path)
    assert [row["switch"] for row in found["rows"]] == list(ablation.SWITCHES)
    assert all(row["same_tokens"] for row in found["rows"])
    by = {row["switch"]: row for row in found["rows"]}
    assert by["all graphs"]["mixed_replays"] == [0, 2]
    ahead, off = by["recompute_ahead"], by["off"]
    assert ahead["mixed_launches"] != off["mixed_launches"]
    by["recompute_ahead"]["holes_launches"] = off["holes_launches"]
    with pytest.raises(AssertionError):
        ablation.check_executed(
            found["rows"], ablation.parse(["--device", "cpu", "--tiny", "--models", str(tmp_path)])
        )


@pytest.mark.needs_module("numba")
def test_strict_mixes(tmp_path: Path) -> None:
    found = result(strict, tmp_path)
    (row,) = found["rows"]
    assert row["mixes"] == 12
    assert row["sharing a prefix"] > 0
    assert row["with preemption"] > 0
    assert row["computed again"] > 0
    assert row["kv_tokens_compared"] > 0
    assert [one["met"] for one in found["aims"]] == [False, False, False, True], "twelve are not two hundred"


@pytest.mark.needs_module("numba")
def test_policies_on_a_starved_pool(tmp_path: Path) -> None:
    found = result(starved, tmp_path)
    assert [row["policy"] for row in found["rows"]] == ["full-recompute", "adaptive", "literal(0.5)"]
    third = int(found["offered_peak_tokens"] / 3) // 16 * 16
    longest = 4 * 20 + 100 + 2 * 16  # of which the pool holds one at least
    assert third <= found["pool_tokens"] <= max(third, longest)
    assert all(row["same tokens"] == "yes" for row in found["rows"])
    assert set(found["step_errors"]) == {"full-recompute", "adaptive", "literal(0.5)"}
    assert all(one["figure"] <= 1.0 for one in found["aims"])


def test_policies_that_would_end_too_late_are_left_out() -> None:
    durations_s = (10.0, 50.0)
    now = time.monotonic()
    assert has_time(None, durations_s)
    assert has_time(now + 100.0, durations_s)
    assert not has_time(now + 65.0, durations_s)  # 60 s and what the simulator takes
    assert has_time(now + 1.0, [])
