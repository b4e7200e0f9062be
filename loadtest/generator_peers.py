"""Other load generators, run as their users run them: guidellm and `vllm bench serve`.

Each gives its own means of TTFT and of the time per output token after the first, in milliseconds. They
live in environments of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKENIZER = Path(__file__).parent.parent / "deploy" / "bundled" / "pydoc-5m"
LIMIT_S = 600.0


@dataclass(frozen=True, slots=True)
class Workload:
    """What every client is asked to send: Poisson arrivals, fixed lengths, completions."""

    url: str
    rate: float
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    seed: int
    model: str = "null-model"


def guidellm(program: str, work: Workload) -> dict[str, float]:
    """Its `inter_token_latency_ms` is (last - first) / (tokens - 1): TPOT by everybody else's name."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        _run(
            [
                program, "run",
                "--backend",
                f"kind=openai_http,target={work.url},model={work.model},request_format=/v1/completions",
                "--tokenizer", f"kind=huggingface_auto,model={TOKENIZER}",
                "--data",
                f"kind=synthetic_text,prompt_tokens={work.prompt_tokens},output_tokens={work.output_tokens}",
                "--profile", f"kind=poisson,rate={work.rate}",
                "--constraint", f"kind=max_requests,count={work.num_requests}",
                "--seed", f"kind=static,value={work.seed}",
                "--output", f"kind=json,path={out}",
                "--disable-console-interactive",
            ]
        )  # fmt: skip
        metrics: Any = json.loads(out.read_text())["benchmarks"][0]["metrics"]
    return {
        "ttft_ms": float(metrics["time_to_first_token_ms"]["successful"]["mean"]),
        "tpot_ms": float(metrics["inter_token_latency_ms"]["successful"]["mean"]),
    }


def vllm(program: str, work: Workload) -> dict[str, float]:
    """`vllm bench serve` on random prompts."""
    with tempfile.TemporaryDirectory() as folder:
        _run(
            [
                program, "bench", "serve", "--backend", "openai", "--base-url", work.url,
                "--endpoint", "/v1/completions", "--model", work.model, "--tokenizer", str(TOKENIZER),
                "--dataset-name", "random", "--random-input-len", str(work.prompt_tokens),
                "--random-output-len", str(work.output_tokens), "--num-prompts", str(work.num_requests),
                "--request-rate", str(work.rate), "--seed", str(work.seed), "--ignore-eos",
                "--save-result", "--result-dir", folder, "--result-filename", "out.json", "--disable-tqdm",
            ]
        )  # fmt: skip
        found = json.loads((Path(folder) / "out.json").read_text())
    return {"ttft_ms": float(found["mean_ttft_ms"]), "tpot_ms": float(found["mean_tpot_ms"])}


PEERS: dict[str, Callable[[str, Workload], dict[str, float]]] = {"guidellm": guidellm, "vllm": vllm}


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed:\n{done.stdout[-3000:]}")
