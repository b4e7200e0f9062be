"""What the engine benchmark says of its sides: speeds by ours, STRICT's cost, memory, and the limits."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest

from ellm.loadtest.engine_bench import rows_of
from ellm.loadtest.limits import machine_limits
from ellm.loadtest.side import OURS, PEERS, Side, side_command

MIB = 2**20
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
}


def sample(prefill: float, decode: float, *mib: int) -> dict[str, object]:
    return {"prefill_tok_s": prefill, "decode_tok_s": decode, "peak_bytes": [size * MIB for size in mib]}


def test_rows_compare_with_strict_within_each_round() -> None:
    samples = {
        "ellm": [sample(100.0, 10.0, 60), sample(300.0, 30.0, 70)],
        "ellm-fast": [sample(200.0, 12.5, 60), sample(300.0, 40.0, 60)],
        "vllm": [sample(50.0, 40.0, 300, 90), sample(100.0, 60.0, 300, 100)],
    }
    same = {"ellm": [1.0, 1.0], "ellm-fast": [1.0, 0.5], "vllm": [0.5, 0.5]}
    ours, fast, vllm = rows_of(samples, same, 2, "float32", {"linear_s": 0.05, "kv_read_s": 0.01})
    assert (ours["decode tok/s"], ours["matmul share"], ours["KV read share"]) == (20.0, 0.5, 0.1)
    assert "ratio" not in ours
    assert (fast["STRICT / FAST prefill"], fast["STRICT / FAST decode"]) == (0.75, 0.775)
    assert "ratio" not in fast
    assert "against" not in fast
    assert fast["same tokens as ellm"] == 0.75
    assert (vllm["ratio prefill"], vllm["ratio"], vllm["against"]) == (2.5, 0.375, "vllm")
    assert (ours["peak MiB"], ours["MiB per process"]) == (70.0, "70")
    assert (vllm["peak MiB"], vllm["MiB per process"]) == (400.0, "300 + 100")


@pytest.mark.parametrize("batch", [1, 3])
def test_the_matmul_limit_is_the_fastest_routine(batch: int) -> None:
    limits = machine_limits("float32", batch, context=16, threads=1, shape=SHAPE)
    routines = [limits[name] for name in ("plain_s", "packed_s", "ours_s") if name in limits]
    assert len(routines) >= 2
    assert limits["linear_s"] == min(routines) > 0
    per_token = 2 * 2 * 16 * 3 * 4  # keys and values, 2 heads of 16, 3 layers, float32
    assert limits["kv_read_s"] == pytest.approx(batch * 16 * per_token / limits["copy_bytes_s"])


def test_every_side_has_a_command_of_its_own(tmp_path: Path) -> None:
    python = tmp_path / "python"
    arguments = Namespace(
        checkpoint=tmp_path,
        threads=1,
        batch=[1, 8],
        input=32,
        output=16,
        vllm_python=python,
        openvino_python=tmp_path / "ov",
        llama_python=tmp_path / "llama",
    )
    commands = {name: side_command(name, "float32", arguments) for name in (*OURS, *PEERS)}
    assert len({tuple(command) for command in commands.values()}) == len(commands)
    assert commands["vllm"][0] == str(python)
    assert commands["generate_batch"][-2:] == ["8", "48"]  # what its cache has to hold
    assert commands["llama.cpp"][-3:] == [f"{tmp_path}-float32.gguf", "8", "48"]


def test_a_side_answers_with_tokens_and_the_memory_of_each_of_its_processes(tmp_path: Path) -> None:
    protocol = Path(__file__).parents[3] / "loadtest" / "sides" / "protocol.py"
    program = f"""
import subprocess, sys
sys.path.insert(0, {str(protocol.parent)!r})
from protocol import serve
command = [sys.executable, "-c", "print('up', flush=True); input()"]
child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()  # until then it may be a fork without memory of its own
print("what engines print must not reach the driver")
serve(lambda prompts, n: [[len(ids)] * n for ids in prompts], note="tiny")
child.communicate(b"end")
"""
    side = Side("tiny", [sys.executable, "-c", program], 1, tmp_path / "tiny.log")
    assert side.note == "tiny"
    answer = side.run([[5, 6, 7], [8]], 2)
    side.close()
    assert answer.tokens == [[3, 3], [1, 1]]
    assert answer.elapsed_s >= 0
    assert len(answer.peak_bytes) == 2
    assert answer.peak_bytes[0] >= answer.peak_bytes[1] > MIB
    with pytest.raises(RuntimeError, match=r"side broken ended:\n(.*\n)*ZeroDivisionError"):
        Side("broken", [sys.executable, "-c", "1 / 0"], 1, tmp_path / "broken.log")
