"""One server with the model that ships: lm-eval against transformers, and hundreds of clients that vanish.

The tests share the server; the last word is that every block is free.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.served import Served, served, wait_for
from support.tree import ROOT

from ellm.deploy.ports import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

FOLDER = ROOT / "deploy" / "bundled" / "pydoc-5m"
TASK = """
task: pydoc_endings
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]
QUESTIONS = [
    ("Return a list of", [" strings", " the names of all files in the directory", " é☃", " -1"]),
    (
        "The list method append adds an item to the",
        [" end of the list", " front", " dictionary that is given"],
    ),
    ("Raise ValueError if the", [" value is not present.", " file", " time zone is not known to the system"]),
    ("os.path.join", [" joins one or more path components intelligently", " removes a file"]),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    (port,) = free_ports(1)
    flags = [
        "--port",
        str(port),
        "--workers",
        "2",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--kv-blocks",
        "2048",
    ]
    with served(*flags) as made:
        made.wait_until_ready()
        yield made


@pytest.fixture(scope="module")
def url(server: Served) -> str:
    return server.wait_until_ready()


def lm_eval(out: Path, tasks: Path, model: str, arguments: str) -> dict[tuple[int, str], float]:
    """Run the command; (question, choice) -> log-likelihood."""
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", model, "--model_args", arguments),
        *("--tasks", "pydoc_endings", "--include_path", str(tasks), "--batch_size", "1"),
        *("--output_path", str(out), "--log_samples"),
    ]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tasks / "cache"),
        "OPENAI_API_KEY": "x",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = out.rglob("samples_pydoc_endings_*.jsonl")
    found = {}
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        for choice, (response,) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            found[sample["doc_id"], choice] = float(response[0])
    return found


@pytest.mark.needs_tool("lm_eval")
def test_lm_eval_scores_as_transformers_does(url: str, tmp_path: Path) -> None:
    """Every continuation's log-likelihood over HTTP (echo, logprobs, token ids) within 2e-5 per token."""
    data = tmp_path / "questions.jsonl"
    rows = [{"question": question, "choices": choices, "answer": 0} for question, choices in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.format(data=data))
    ours = lm_eval(
        tmp_path / "ours",
        tmp_path,
        "local-completions",
        f"model=pydoc-5m,base_url={url}/v1/completions,tokenizer={FOLDER},num_concurrent=4,max_length=2048,add_bos_token=True",
    )
    theirs = lm_eval(
        tmp_path / "theirs",
        tmp_path,
        "hf",
        f"pretrained={FOLDER},dtype=float32,max_length=2048,add_bos_token=True",
    )
    assert len(ours) == sum(len(choices) for _, choices in QUESTIONS)
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[key] - theirs[key]) for key in ours) <= 2e-5


async def ask(port: int, index: int, num_prompt: int) -> Line:
    """Send a request for a stream."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    prompt = [3 + (index + i) % 4000 for i in range(num_prompt)]
    body = {"prompt": prompt, "max_tokens": 400, "ignore_eos": True, "stream": True}
    payload = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    writer.write(head.encode() + payload)
    await writer.drain()
    return reader, writer


def reset(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not a goodbye
    writer.close()


async def vanish_after_first_token(port: int, count: int) -> None:
    """At most 100 at once."""
    gate = asyncio.Semaphore(100)

    async def one(index: int) -> None:
        async with gate:
            reader, writer = await ask(port, index, 20)
            assert b" 200 " in await reader.readline()
            while not (await reader.readline()).startswith(b"data: {"):
                pass
            reset(writer)

    await asyncio.gather(*(one(index) for index in range(count)))


async def vanish_in_prefill(url: str, port: int, indices: range) -> None:
    """All at once, while workers hold their requests and not a byte of an answer has come."""
    lines = await asyncio.gather(*(ask(port, index, 1600) for index in indices))
    answers = [asyncio.create_task(reader.read(1)) for reader, _ in lines]
    held = 0
    for _ in range(500):
        held = sum(w["num_running"] + w["num_waiting"] for w in await asyncio.to_thread(workers, url))
        if held:
            break
        await asyncio.sleep(0.01)
    answered = sum(answer.done() for answer in answers)
    for _, writer in lines:
        reset(writer)
    await asyncio.gather(*answers, return_exceptions=True)
    assert held > answered, f"{held} requests on workers, {answered} were already answered"


def workers(url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(f"{url}/admin/workers", timeout=20).json()["workers"]
    return found


def nothing_is_held(url: str) -> bool:
    return all(
        w["num_running"] == w["num_waiting"] == 0 and w["free_blocks"] + w["cached_blocks"] == w["num_blocks"]
        for w in workers(url)
    )


def test_clients_that_vanish_leave_nothing_behind(url: str) -> None:
    port = int(url.rsplit(":", 1)[1])
    before = workers(url)
    asyncio.run(vanish_after_first_token(port, 500))
    for first in (1000, 2000):  # prompts that no worker has in its cache
        wait_for(lambda: nothing_is_held(url), 60)
        asyncio.run(vanish_in_prefill(url, port, range(first, first + 100)))
    wait_for(lambda: nothing_is_held(url), 60)
    after = workers(url)
    assert [w["epoch"] for w in after] == [w["epoch"] for w in before], "a worker was restarted"
    # Far fewer tokens than were asked for: the engine stopped when the clients did.
    made = sum(w["generation_tokens"] for w in after) - sum(w["generation_tokens"] for w in before)
    assert 500 <= made < 500 * 400 / 2
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": "Return", "max_tokens": 4}, timeout=30)
    assert answer.status_code == 200
