"""The Triton kernels: right under the interpreter, compiled for Hopper, and a check of them that can fail.

Whether kernels are interpreted is settled when Triton is first imported: each way has a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import write_checkpoint
from support.tree import ROOT

from ellm.deploy import cli

TIMEOUT_S = 900  # of a process: 15 s on an idle core, minutes on a loaded machine
MIXES_S = 5400  # of 200 mixes: ten minutes and more on an idle core
pytestmark = [pytest.mark.needs_module("triton"), pytest.mark.timeout(TIMEOUT_S + 60)]

ROW_KERNELS = {
    "rms_norm",
    "layer_norm",
    "silu_mul",
    "rotary",
    "kv_store",
    "rotary_store",
    "linear",
    "kv_copy",
}
KERNELS = ROW_KERNELS | {"sample", "logprobs", "paged_attention", "fused_attention"}
COMPILED = ROW_KERNELS | {"sample", "bias", "penalise", "score", "attend", "attend_both", "join"}


def python(*words: str, timeout_s: float = TIMEOUT_S, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "PYTHONWARNINGS": "ignore"} | environment
    command = [sys.executable, *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)


def check(*words: str, **environment: str) -> tuple[int, dict[str, Any]]:
    done = python("-m", "ellm.deploy.cli", "kernels", "check", "--json", *words, **environment)
    assert done.stdout, done.stderr[-2000:]
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("triton"))


def test_every_kernel_equals_its_twin() -> None:
    code, told = check("--quick")
    assert [case for case in told["cases"] if not case["passed"]] == []
    assert (code, told["failed"]) == (0, 0)
    assert set(told["kernels"]) == KERNELS
    script = (ROOT / "loadtest" / "gpu" / "checks.sh").read_text()
    assert set(script.partition('KERNELS="')[2].partition('"')[0].split()) == KERNELS, "one step for each"
    details = [case["detail"] for case in told["cases"] if case["kernel"] == "paged_attention"]
    for dtype, least in (("float32", 4), ("bfloat16", 18), ("float16", 6)):  # head dimensions times tiles
        own = [detail for detail in details if detail.startswith(f"{dtype} ")]
        assert sum("window" in detail for detail in own) == least
        assert sum("in a chunk" in detail for detail in own) == 1
    alone = [case for case in told["cases"] if case["kernel"] == "linear" and "in company" in case["detail"]]
    assert [case["error"] for case in alone] == [0.0] * 3
    assert {"32", "256"} <= {word.partition("x")[2] for d in details for word in d.split() if ":" in word}


# Each a way to be wrong, in one process: compiling nothing, it takes Triton's import alone.
BROKEN = """
import itertools, json, os, sys
from dataclasses import replace
os.environ["TRITON_INTERPRET"] = "1"
from ellm.deploy.cli import main
from ellm.kernels import triton_check, triton_rows, triton_tiles
from ellm.kernels.triton_cases import POISON

right = triton_rows.silu_mul
def a_little_off(x): return right(x) * 1.05
def one_unwritten(x):
    out = right(x)
    out[-1:, -1:] = POISON
    return out
def raises(x): raise RuntimeError("no such instruction")
def other_shape(x): return right(x)[:, :-1]
codes = {}
for wrong in (a_little_off, one_unwritten, raises, other_shape, right):
    triton_rows.silu_mul = wrong
    codes[wrong.__name__] = main(["kernels", "check", "--quick", "--kernel", "silu_mul"])

attend = triton_tiles.paged_attention
def sees_the_next_slot(q, k, v, meta, *rest, **keywords):
    meta = replace(meta, kv_lens=meta.kv_lens + 1, positions=meta.positions + 1)
    return attend(q, k, v, meta, *rest, **keywords)
def other_scale(q, k, v, meta, scale, *rest, **keywords):
    return attend(q, k, v, meta, 1.1 * scale, *rest, **keywords)
def other_sums(q, k, v, meta, scale, window, choice):
    return attend(q, k, v, meta, scale, window, replace(choice, same_sums=meta.num_decode > 0))
from ellm.kernels.triton_cases import TINY
from ellm.kernels.triton_step_cases import cases
device = triton_check.torch.device("cpu")
plain, exact = [
    next(c for c in cases(TINY, quick=True) if c.kernel == "paged_attention" and bool(c.again) == again
         and (not again or "in a chunk" in c.detail))
    for again in (False, True)
]
for case, wrongs in ((plain, (sees_the_next_slot, other_scale)), (exact, (other_sums,))):
    for wrong in wrongs:
        triton_tiles.paged_attention = wrong
        codes[wrong.__name__] = int(not triton_check.judge(case, device).passed)
print(json.dumps(codes))
"""


@pytest.mark.slow
def test_every_kernel_equals_its_twin_in_every_configuration() -> None:
    code, told = check()
    assert [case for case in told["cases"] if not case["passed"]] == []
    assert (code, set(told["kernels"])) == (0, KERNELS)
    assert told["total"] > 500


@pytest.mark.slow
def test_every_configuration_compiles_for_hopper(cache: str) -> None:
    code, told = check("--aot", "sm_90", TRITON_CACHE_DIR=cache)
    assert [case for case in told["cases"] if not case["passed"]] == []
    assert code == 0


def test_a_kernel_that_is_wrong_is_found() -> None:
    done = python("-c", BROKEN)
    assert done.returncode == 0, done.stderr[-2000:]
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes.pop("silu_mul") == 0
    assert codes == dict.fromkeys(codes, 1)
    assert len(codes) == 7
    assert "FAIL silu_mul" in done.stdout
    assert "RuntimeError: no such instruction" in done.stdout


def test_every_kernel_compiles_for_hopper(cache: str) -> None:
    code, told = check("--aot", "sm_90", "--quick", TRITON_CACHE_DIR=cache)
    assert [case for case in told["cases"] if not case["passed"]] == []
    assert code == 0
    assert set(told["kernels"]) == COMPILED
    for case in told["cases"]:
        assert 0 < case["registers"] <= 255
    by_matrix = {"attend", "attend_both", "linear"}
    chunks = [c for c in told["cases"] if c["kernel"] in by_matrix and "single" not in c["detail"]]
    assert {case["matrix"] for case in chunks} == {"wgmma"}


@pytest.mark.slow
@pytest.mark.timeout(MIXES_S + 60)
def test_two_hundred_strict_mixes_keep_their_bits(tmp_path: Path) -> None:
    """Random mixes on interpreted kernels; the script itself compares them with what each request says
    alone."""
    out = tmp_path / "strict.json"
    script = ("-m", "ellm.loadtest.gpu.strict", "--device", "cpu", "--tiny", "--models", str(tmp_path))
    environment = {"TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(tmp_path)}
    words = ("--mixes", "200", "--fused", "--out", str(out))
    done = python(*script, *words, timeout_s=MIXES_S, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["body"], row["mixes"]) == ("triton", 200)
    assert row["sharing a prefix"] >= 50
    assert min(row[kind] for kind in ("with parking", "computed again", "streamed")) > 5
    assert row["kv_tokens_compared"] > 0


@pytest.mark.slow
def test_each_switch_alone_changes_what_runs_and_no_token(tmp_path: Path) -> None:
    """The script itself compares both."""
    out = tmp_path / "ablation.json"
    script = ("-m", "ellm.loadtest.gpu.ablation", "--device", "cpu", "--tiny", "--models", str(tmp_path))
    environment = {"TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(tmp_path)}
    done = python(*script, "--out", str(out), **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    by = {row["switch"]: row for row in json.loads(out.read_text())["rows"]}
    assert by["fused_attention"]["holes_launches"] != by["off"]["holes_launches"]


UNFIT = """
from ellm.deploy.cli import main
from ellm.kernels import triton_aot
triton_aot.SHARED_LIMIT = 1 << 10
raise SystemExit(main(["kernels", "check", "--aot", "sm_90", "--quick", "--kernel", "silu_mul"])
    + 10 * main(["kernels", "check", "--aot", "sm_90", "--quick", "--kernel", "paged_attention"]))
"""


def test_a_kernel_that_does_not_fit_is_found(cache: str) -> None:
    done = python("-c", UNFIT, TRITON_CACHE_DIR=cache)
    assert done.returncode == 10, done.stdout + done.stderr[-2000:]
    assert "FAIL attend" in done.stdout


def test_what_cannot_be_checked_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--aot", "hopper"], "--aot: a GPU's architecture is written as sm_90, not 'hopper'"),
        (["--aot", "sm_75"], "--aot: the Triton kernels need compute capability 8.0, not sm_75"),
        (["--aot", "sm_90", "--quick", "--kernel", "silu"], "there is no kernel 'silu'"),
    ):
        assert cli.main(["kernels", "check", *words]) == 2
        assert capsys.readouterr().err == f"ellm kernels: {message}\n"


def test_a_gpu_that_the_kernels_are_not_for_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert cli.main(["kernels", "check"]) == 2
    expected = "ellm kernels: the Triton kernels need compute capability 8.0, this GPU has 7.0\n"
    assert capsys.readouterr().err == expected


def test_an_engine_on_the_kernels_says_what_one_on_torch_says(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", num_attention_heads=4, head_dim=16)
    done = python("-m", "support.triton_engine", str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    plain, every = told["triton"], told["every switch"]
    assert plain["tokens"] == every["tokens"] == told["torch"]["tokens"]
    assert [len(outputs) for outputs in plain["tokens"]] == [6, 8]
    # One launch for both kinds of rows, and only where there is a hole.
    assert [plain["before"], plain["holed"]] == [["attend_kernel"]] * 2
    assert [every["before"], every["holed"]] == [["attend_kernel"], ["attend_both_kernel"]]
    assert [plain["replays"], every["replays"]] == [0, 3]
    # A prompt, a chunk beside a decode row, and the steps with a hole.
    assert [plain["pieces"], every["pieces"]] == [0, 2 + 3]
