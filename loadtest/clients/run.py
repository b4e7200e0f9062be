"""Other people's clients, unchanged, against `ellm serve` on the model that ships.

    python -m ellm.loadtest.clients.run --litellm PYTHON --instructor PYTHON --langchain PYTHON \\
        --vllm VLLM --aiperf AIPERF --buf BUF

Each flag names the interpreter, or the program, of an environment that has the client; those without are left
out. With --url and --grpc a server that runs already is asked. docs/clients.md says how to make the
environments. A client fails if its checks do, if it ends with an error, or if it counts a failed request.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ellm.loadtest.result import Result, Row, command_line
from ellm.loadtest.served import answers, left_over, served

HERE = Path(__file__).parent
TOKENIZER = HERE.parent.parent / "deploy" / "bundled" / "pydoc-5m"
REQUESTS = 40
LIMIT_S = 1800
ABOUT = """\
Clients that others have written, as they are, against `ellm serve` with two workers on the bundled model
(which says nothing sensible, so that what must have a form has it by constrained decoding alone). litellm,
instructor and langchain-openai run the checks in loadtest/clients; `vllm bench serve` and aiperf send
{requests} streamed requests each; `buf curl` calls every service with what reflection says."""


@dataclass(frozen=True, slots=True)
class Target:
    url: str
    grpc: str
    model: str


@dataclass(frozen=True, slots=True)
class Found:
    """What a client said."""

    checks: list[str]
    fault: str = ""


def script(name: str) -> Callable[[str, Target], Found]:
    """A file of this folder, with the client's interpreter."""

    def run(python: str, target: Target) -> Found:
        done = _run([python, str(HERE / f"{name}_checks.py"), target.url, target.model])
        return Found(done.stdout.splitlines(), "" if done.returncode == 0 else done.stderr[-600:])

    return run


def vllm(program: str, target: Target) -> Found:
    """Completions and chats."""
    checks: list[str] = []
    for backend, path in (("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")):
        done = _run(
            [
                *(program, "bench", "serve", "--backend", backend, "--base-url", target.url),
                *("--endpoint", path, "--model", target.model, "--tokenizer", str(TOKENIZER)),
                *("--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "16"),
                *("--num-prompts", str(REQUESTS), "--max-concurrency", "8", "--ignore-eos"),
            ]
        )
        figures = dict(re.findall(r"^([A-Z][\w ()/]+):\s+([\d.]+)\s*$", done.stdout, re.MULTILINE))
        good = figures.get("Successful requests"), figures.get("Total generated tokens")
        if done.returncode or good != (str(REQUESTS), str(16 * REQUESTS)):
            return Found(checks, f"{backend}: {good} {(done.stdout + done.stderr)[-600:]}")
        checks.append(f"{backend}: {REQUESTS} requests of 16 tokens")
    return Found(checks)


def aiperf(program: str, target: Target) -> Found:
    """Chats and completions, streamed, whose form it checks chunk by chunk."""
    checks: list[str] = []
    for kind in ("chat", "completions"):
        with tempfile.TemporaryDirectory() as folder:
            done = _run(
                [
                    *(program, "profile", "--model", target.model, "--url", target.url, "--streaming"),
                    *("--endpoint-type", kind, "--tokenizer", str(TOKENIZER), "--concurrency", "4"),
                    *("--request-count", str(REQUESTS), "--synthetic-input-tokens-mean", "50"),
                    *("--output-tokens-mean", "16", "--artifact-dir", folder, "--ui", "none"),
                ],
                without=("HF_HUB_OFFLINE",),
            )
            reports = list(Path(folder).rglob("profile_export_aiperf.json"))
            report = json.loads(reports[0].read_text()) if reports else {}
        counted = report.get("request_count", {}).get("avg"), report.get("error_request_count", {}).get("avg")
        if done.returncode or counted[0] != REQUESTS or counted[1]:
            return Found(checks, f"{kind}: {counted} {(done.stdout + done.stderr)[-600:]}")
        checks.append(f"{kind}: {REQUESTS} streamed requests, no error")
    return Found(checks)


CALLS = {
    "ellm.v1.Inference/GetModelInfo": {},
    "ellm.v1.Inference/GetServerInfo": {},
    "ellm.v1.Inference/Generate": {
        "text": "A list is", "stream": True, "samplingParams": {"maxTokens": 8, "ignoreEos": True}
    },
    "inference.GRPCInferenceService/ServerLive": {},
    "inference.GRPCInferenceService/ServerMetadata": {},
    "inference.GRPCInferenceService/ModelInfer": {
        "modelName": "{model}",
        "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1],
                    "contents": {"bytesContents": ["QSBsaXN0IGlz"]}}],
        "parameters": {"max_tokens": {"int64Param": 4}},
    },
    "grpc.health.v1.Health/Check": {},
}  # fmt: skip


def buf(program: str, target: Target) -> Found:
    """No schema is given: it asks the server for it."""
    plain = [program, "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
    checks: list[str] = []
    for method, body in CALLS.items():
        data = json.dumps(body).replace("{model}", target.model)
        done = _run([*plain, "-d", data, f"http://{target.grpc}/{method}"])
        if done.returncode or not done.stdout.strip().startswith("{"):
            return Found(checks, f"{method}: {(done.stdout + done.stderr)[-600:]}")
        checks.append(method)
    listed = _run([*plain, "--list-services", f"http://{target.grpc}"])
    services = {method.partition("/")[0] for method in CALLS}
    if not services <= set(listed.stdout.split()):
        return Found(checks, f"not listed: {listed.stdout}{listed.stderr}"[-600:])
    return Found([*checks, "its services are listed"])


def _run(words: list[str], without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in without}
    return subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, env=kept)


CLIENTS: dict[str, Callable[[str, Target], Found]] = {
    "litellm": script("litellm"),
    "instructor": script("instructor"),
    "langchain": script("langchain"),
    "vllm": vllm,
    "aiperf": aiperf,
    "buf": buf,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in CLIENTS:
        parser.add_argument(f"--{name}", metavar="PATH")
    parser.add_argument("--url", help="of a server that runs already")
    parser.add_argument("--grpc", help="and its HOST:PORT of gRPC")
    parser.add_argument("--model", default="pydoc-5m")
    parser.add_argument("--port", type=int, default=8195, help="and the next for gRPC")
    parser.add_argument("--name", default="clients", help="slug of the result file")
    return parser.parse_args()


def main() -> int:
    asked = parse()
    rows: list[Row] = []
    faults = []
    words = ("--workers", "2", "--device", "cpu", "--dtype", "float32", "--kv-blocks", "1024",
             "--port", str(asked.port), "--grpc-port", str(asked.port + 1))  # fmt: skip
    with nullcontext(asked.url) if asked.url else served(*words) as url:
        target = Target(url, asked.grpc or f"127.0.0.1:{asked.port + 1}", asked.model)
        for name, run in CLIENTS.items():
            path = getattr(asked, name)
            if path is None:
                continue
            start = time.monotonic()
            found = run(path, target)
            rows.append(
                {
                    "client": name, "checks": len(found.checks), "failed": int(bool(found.fault)),
                    "seconds": round(time.monotonic() - start), "what": "; ".join(found.checks),
                }
            )  # fmt: skip
            print(rows[-1], found.fault, flush=True)
            faults += [f"{name}: {found.fault}"] if found.fault else []
        faults += [f"left over: {count} {what}" for what, count in left_over(url).items() if count]
        if not answers(url):
            faults.append("a normal request fails")
    Result(
        asked.name, "Other people's clients", ABOUT.format(requests=REQUESTS),
        command_line("ellm.loadtest.clients.run"), rows, notes=faults,
    ).write()  # fmt: skip
    print(*faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
