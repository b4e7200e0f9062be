"""A side of the engine benchmark, seen from the driver: a process that answers prompts with tokens."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIDES = Path(__file__).parent / "sides"


@dataclass(frozen=True, slots=True)
class Answer:
    elapsed_s: float
    tokens: list[list[int]]
    peak_bytes: list[int]  # of each of the side's processes so far, the largest first


class Side:
    """One engine, loaded and waiting. Use `run`, then `close`."""

    def __init__(self, name: str, command: list[str], threads: int, log: Path) -> None:
        self.name = name
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "NUMBA_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if threads > 1 else "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_NO_USAGE_STATS": "1",
        }
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        self.note = str(self._read().get("note", ""))

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            tail = "\n".join(self._log.read_text().splitlines()[-15:])
            raise RuntimeError(f"side {self.name} ended:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, prompts: list[list[int]], max_tokens: int) -> Answer:
        """Generate exactly `max_tokens` for every prompt; the side checks the count and times itself."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        return Answer(answer["elapsed_s"], answer["tokens"], answer["peak_bytes"])

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


OURS = ("ellm", "ellm-fast", "ellm-torch")
PEERS = ("generate", "generate_batch", "vllm", "openvino", "llama.cpp")


def side_command(name: str, dtype: str, arguments: argparse.Namespace) -> list[str]:
    """How to start a side. Ours run as a module, peers by path with their own interpreter."""
    folder, threads = str(arguments.checkpoint.resolve()), str(arguments.threads)
    if name in OURS:
        return [sys.executable, "-m", "ellm.loadtest.sides.ellm_side", folder, dtype, threads, name]
    if name == "vllm":
        return [str(arguments.vllm_python), str(SIDES / "vllm_side.py"), folder, dtype]
    if name == "openvino":
        most = 2 * max(arguments.batch) * (arguments.input + arguments.output)
        command = [str(arguments.openvino_python), str(SIDES / "openvino_side.py"), folder, dtype, threads]
        return [*command, f"{folder}-openvino", str(most)]
    if name == "llama.cpp":
        command = [str(arguments.llama_python), str(SIDES / "llama_side.py"), folder, dtype, threads]
        room = [str(max(arguments.batch)), str(arguments.input + arguments.output)]
        return [*command, f"{folder}-{dtype}.gguf", *room]
    command = [sys.executable, str(SIDES / "generate_side.py"), folder, dtype, threads, name]
    if name == "generate_batch":
        command += [str(max(arguments.batch)), str(arguments.input + arguments.output)]
    return command


def start_sides(names: list[str], dtype: str, arguments: argparse.Namespace) -> tuple[list[Side], list[str]]:
    """Start every side that can run here; what cannot is told in the notes."""
    sides: list[Side] = []
    notes: list[str] = []
    pythons = {
        "vllm": arguments.vllm_python,
        "openvino": arguments.openvino_python,
        "llama.cpp": arguments.llama_python,
    }
    for name in names:
        if name in pythons and not pythons[name].exists():
            notes.append(f"{name} not run: its environment is missing (`make bench-peers` makes it)")
            continue
        print(f"loading {name} ({dtype})", flush=True)
        sides.append(
            Side(name, side_command(name, dtype, arguments), arguments.threads, Path(f".cache/{name}.log"))
        )
        if sides[-1].note:
            notes.append(f"{name}: {sides[-1].note}")
    return sides, notes
