"""Our server and its peers, each with the same checkpoint, threads, dtype and KV bytes, for as long as a
measurement takes.

What is equal: the blocks of KV and their size, the most sequences at once, the most tokens of a step, the
watermark, prefix caching, the context's length. vLLM keeps its block 0 for itself, so it gets one more.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ellm.loadtest.http_sides import QUIET
from ellm.loadtest.served import SERVE, Started, started

MODEL = "bench"  # what every side calls it
ELLM, PLAIN, VLLM = "ellm serve", "plain Serve", "vLLM"
START_S = 1200.0
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Setting:
    """What the sides have in common. `kv_bytes` holds keys and values of all layers."""

    checkpoint: Path
    dtype: str
    threads: int
    kv_bytes: int
    block_size: int = 32  # tokens; vLLM's CPU build wants multiples of 32
    max_num_seqs: int = 64
    max_step_tokens: int = 2048
    max_model_len: int = 1024
    prefix_caching: bool = False
    vllm_more: tuple[str, ...] = ()  # further arguments of vLLM's command

    @property
    def num_blocks(self) -> int:
        return num_blocks_in(self.kv_bytes, self.block_size, kv_token_bytes(self.checkpoint, self.dtype))


def kv_token_bytes(checkpoint: Path, dtype: str) -> int:
    """Of one token's keys and values in all layers, by the checkpoint's config.json."""
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return int(2 * config["num_hidden_layers"] * kv_heads * head_dim * BYTES[dtype])


def num_blocks_in(kv_bytes: int, block_size: int, token_bytes: int) -> int:
    """Whole blocks of `block_size` tokens."""
    return kv_bytes // (block_size * token_bytes)


def ellm_words(
    setting: Setting,
    port: int,
    policy: str | None = None,
    host_bytes: int = 0,
    more: Mapping[str, object] | None = None,
) -> list[str]:
    """Arguments of `ellm` for one worker; `more`: other keys of its config."""
    words = ["serve", str(setting.checkpoint.resolve()), "--workers", "1", "--served-model-name", MODEL]
    words += ["--port", str(port), "--grpc-port", str(port + 1000), "--dtype", setting.dtype]
    words += ["--kv-blocks", str(setting.num_blocks), "--max-model-len", str(setting.max_model_len)]
    if policy is not None:
        words += ["--policy", policy]
    worker = {
        "num_threads": setting.threads,
        "cache.block_size": setting.block_size,
        "cache.prefix_caching": str(setting.prefix_caching).lower(),
        "cache.host_bytes": host_bytes,
        "scheduler.max_num_seqs": setting.max_num_seqs,
        "scheduler.max_step_tokens": setting.max_step_tokens,
        "scheduler.watermark": 0,
    }
    for key, value in {**{f"worker.{key}": value for key, value in worker.items()}, **(more or {})}.items():
        words += ["--set", f"{key}={value}"]
    return words


def vllm_words(setting: Setting, port: int) -> list[str]:
    """Arguments of `vllm`."""
    words = ["serve", str(setting.checkpoint.resolve()), "--served-model-name", MODEL]
    words += ["--host", "127.0.0.1", "--port", str(port), "--dtype", setting.dtype]
    words += ["--num-gpu-blocks-override", str(setting.num_blocks + 1)]
    words += ["--block-size", str(setting.block_size), "--max-model-len", str(setting.max_model_len)]
    words += ["--max-num-seqs", str(setting.max_num_seqs)]
    words += ["--max-num-batched-tokens", str(setting.max_step_tokens)]
    words += ["--enable-prefix-caching" if setting.prefix_caching else "--no-enable-prefix-caching"]
    return [*words, "--enable-chunked-prefill", "--disable-uvicorn-access-log", *setting.vllm_more]


def vllm_environment(setting: Setting, metadata: Path) -> dict[str, str]:
    """`metadata`: a folder in which the CPU build finds itself under the name its command asks for."""
    gib = max(1, -(-2 * setting.kv_bytes // 2**30))  # only a bound: the number of blocks is given
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {  # it takes as many threads as cores it is bound to, and says itself that it should not be told
        **inherited,
        "PYTHONPATH": str(metadata),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[: setting.threads])),
        "VLLM_CPU_KVCACHE_SPACE": str(gib),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def ellm_server(
    setting: Setting,
    port: int,
    policy: str | None = None,
    host_bytes: int = 0,
    more: Mapping[str, object] | None = None,
) -> AbstractContextManager[Started]:
    """`ellm serve` with one worker; arguments as those of `ellm_words`."""
    return started(SERVE, ellm_words(setting, port, policy, host_bytes, more))


def plain_server(setting: Setting, port: int) -> AbstractContextManager[Started]:
    """Our engine behind Ray Serve alone: a FastAPI ingress, a deployment, a handle's stream per request."""
    words = ["--stages", "2", "--port", str(port), "--model", str(setting.checkpoint.resolve())]
    words += ["--max-num-seqs", str(setting.max_num_seqs), "--num-blocks", str(setting.num_blocks)]
    words += ["--block-size", str(setting.block_size), "--max-step-tokens", str(setting.max_step_tokens)]
    words += ["--max-model-len", str(setting.max_model_len), "--dtype", setting.dtype]
    words += ["--threads", str(setting.threads)]
    if not setting.prefix_caching:
        words.append("--no-prefix-caching")
    return started("ellm.loadtest.plain_ingress", words, {**os.environ, **QUIET})


@contextmanager
def vllm_server(program: Path, setting: Setting, port: int, log: Path) -> Iterator[Started]:
    """`program`: the `vllm` of an environment of its own."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        about = Path(folder) / "vllm-0.32.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
        environment = vllm_environment(setting, Path(folder))
        url = f"http://127.0.0.1:{port}"
        with listening([str(program), *vllm_words(setting, port)], environment, url, log) as server:
            yield server


@contextmanager
def listening(command: list[str], env: Mapping[str, str], url: str, log: Path) -> Iterator[Started]:
    """A program until its `/health` answers; ended by
    SIGTERM, and all it has started with it. Raises RuntimeError with its last lines."""
    begun = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=dict(env), start_new_session=True
        )
    try:
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() - begun > START_S:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                raise RuntimeError(f"{command[0]} is not ready:\n{tail}")
            time.sleep(0.5)
        yield Started(process.pid, url, time.monotonic() - begun)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """And whatever it has started: a server that is killed may leave its engine behind."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=60.0)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def unwind_on_sigterm() -> None:
    """So that no server outlives who started it: the signal's default ends a process where it stands."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5.0) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
