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

from ellm.loadtest.gpu import ablation, attention, engine, starved, strict, summary
from ellm.loadtest.gpu.models import SHAPES, make_model, work_of
from ellm.loadtest.gpu.timing import aim
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
    loops = ("attention", "fusion", "kernels", "graphs", "host_copies", "steps", "ablation", "strict")
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


def test_the_engines_speed(tmp_path: Path) -> None:
    found = result(engine, tmp_path, "--vllm-python", "/nowhere/python")
    (model,) = found["models"]
    assert [(row["side"], row["batch"]) for row in model["rows"]] == [("ellm", 1), ("ellm", 3)]
    for row in model["rows"]:
        assert min(row[k] for k in ("decode_tok_s", "prefill_tok_s", "decode_share", "prefill_share")) > 0.0
    (note,) = model["notes"]
    assert note.startswith("vLLM did not run: "), "what is beside ours may fail alone"


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
    made = engine.aims([{"model": "llama-3-8b", "rows": rows}])
    assert [(one["figure"], one["least"], one["met"]) for one in made] == [
        (0.8, 0.75, True),
        (0.7, 0.8, False),
        (0.9, 0.8, True),
    ]
    decode = {"batch": 8, "context": 16384, "kv_mib": 512.0, "share_of_copy": 0.9}
    prefill = {"tokens": 4096, "flash_over_ours": 0.85}
    found = {
        "decode": [
            decode | {"served": True},
            decode | {"served": False},
            decode | {"served": True, "kv_mib": 9},
        ],
        "prefill": [prefill | {"served": True}, prefill | {"served": False}, {"tokens": 1, "served": True}],
    }
    assert [one["met"] for one in attention.aims(found)] == [True, False]
    (tmp_path / "attention.json").write_text(json.dumps({"device": "H", "aims": [aim("decode", 0.8, 0.85)]}))
    (tmp_path / "steps.json").write_text(json.dumps({"device": "H", "notes": ["a note"]}))
    assert summary.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["MISSED attention: decode: 0.8, at least 0.85", "note   steps: a note"]
    assert said[2:] == [f"absent {name}" for name in summary.EXPECTED if name not in ("attention", "steps")]
    assert json.loads((tmp_path / "summary.json").read_text())["lines"] == said
    assert summary.main([str(tmp_path / "empty")]) == 1


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
    assert row["with preemption"] + row["with parking"] > 0
    assert row["computed again"] > 0
    assert row["kv_tokens_compared"] > 0
    assert [one["met"] for one in found["aims"]] == [False, False, True], "twelve are not two hundred"


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
    runs = [{"measured": {"duration_s": seconds}} for seconds in (10.0, 50.0)]
    now = time.monotonic()
    assert has_time(None, runs)
    assert has_time(now + 100.0, runs)
    assert not has_time(now + 55.0, runs)
    assert has_time(now + 1.0, [])
