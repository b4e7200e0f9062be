"""From `ellm serve` to the last process: the model that ships, two workers, real clients, one lost worker.

The tests share one server and run in their order; the last one stops it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.processes import process_alive
from support.served import ELLM, Served, served, wait_for

from ellm.deploy.ports import free_ports
from ellm.router.rpc.ellm_inference_pb2 import GenerateRequest, SamplingParams
from ellm.router.rpc.ellm_inference_pb2_grpc import InferenceStub
from ellm.router.rpc.open_inference_pb2 import ModelInferRequest
from ellm.router.rpc.open_inference_pb2_grpc import GRPCInferenceServiceStub

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

PROMPT = "The list method append"
RECEIVE_S = 6


@pytest.fixture(scope="module")
def audit_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "audit.jsonl"


@pytest.fixture(scope="module")
def server(audit_log: Path) -> Iterator[Served]:
    port, grpc_port = map(str, free_ports(2))
    flags = ["--port", port, "--grpc-port", grpc_port, "--workers", "2", "--device", "cpu"]
    flags += ["--kv-blocks", "512", "--set", f"router.audit_log={audit_log}"]
    flags += ["--set", f"router.limits.receive_timeout_s={RECEIVE_S}"]
    with served(*flags) as made:
        made.wait_until_ready()
        yield made


@pytest.fixture(scope="module")
def url(server: Served) -> str:
    return server.wait_until_ready()


@pytest.fixture(scope="module")
def channel(server: Served) -> Iterator[grpc.Channel]:
    address = server.wait_for_line(r"^gRPC: (127\.0\.0\.1:\d+)$").group(1)
    with grpc.insecure_channel(address) as made:
        yield made


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    (found,) = client.models.list().data
    return found.id


def status(url: str) -> list[dict[str, Any]]:
    done = subprocess.run([ELLM, "status", "--url", url, "--json"], capture_output=True, text=True)
    workers: list[dict[str, Any]] = json.loads(done.stdout)["workers"] if done.returncode == 0 else []
    return workers


def ready_workers(url: str) -> list[dict[str, Any]]:
    return [worker for worker in status(url) if worker["state"] == "ready"]


def long_stream(client: openai.OpenAI, model: str, num_tokens: int) -> Any:
    """A greedy stream that ends by length alone."""
    extra = {"ignore_eos": True}
    return client.completions.create(
        model=model, prompt=PROMPT, max_tokens=num_tokens, temperature=0, stream=True, extra_body=extra
    )


def test_it_says_what_it_does_and_how_to_ask_it(server: Served, url: str) -> None:
    for phase in (
        "Ray: ",
        "Ray Serve with ",
        "2 workers on cpu: ready",
        "each worker: ",
        "Router",
        "HTTP ingress",
    ):
        server.wait_for_line(rf"^\[ *\d+\.\d s\] +{phase}", 5.0)
    assert "KV pool 512 blocks = 8,192 tokens" in server.output
    curl = server.output[server.output.index("curl") :].partition("ellm chat")[0]
    done = subprocess.run(["bash", "-c", f"{curl} -sS"], capture_output=True, text=True)
    if done.returncode != 127:  # curl may be missing
        assert json.loads(done.stdout)["choices"][0]["text"]


def test_a_completion(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=16, temperature=0)
    assert answer.choices[0].text.strip()
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 16
    again = client.completions.create(model=model, prompt=PROMPT, max_tokens=16, temperature=0)
    assert again.choices[0].text == answer.choices[0].text


def test_the_same_over_grpc(client: openai.OpenAI, model: str, channel: grpc.Channel) -> None:
    told = client.completions.create(model=model, prompt=PROMPT, max_tokens=16, temperature=0)
    assert told.usage is not None
    params = SamplingParams(max_tokens=16, temperature=0.0)
    request = GenerateRequest(text=PROMPT, sampling_params=params)
    responses = list(InferenceStub(channel).Generate(request, timeout=120))
    assert "".join(one.text for one in responses) == told.choices[0].text
    assert responses[-1].finish_reason == told.choices[0].finish_reason
    assert responses[-1].usage.completion_tokens == told.usage.completion_tokens
    message = ModelInferRequest(model_name=model)
    tensor = message.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(PROMPT.encode())
    message.parameters["max_tokens"].int64_param = 16
    message.parameters["temperature"].double_param = 0.0
    answer = GRPCInferenceServiceStub(channel).ModelInfer(message, timeout=120)
    assert answer.outputs[0].contents.bytes_contents[0].decode() == told.choices[0].text
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
    assert health.status == health_pb2.HealthCheckResponse.SERVING


def test_structured_answers(client: openai.OpenAI, model: str) -> None:
    """The bundled model knows no JSON and no tools: what comes is what the grammar makes it say."""
    schema = {
        "type": "object", "properties": {"kind": {"enum": ["list", "dict"]}, "ok": {"type": "boolean"}},
        "required": ["kind", "ok"], "additionalProperties": False,
    }  # fmt: skip
    messages: Any = [{"role": "user", "content": "What is a list?"}]
    asked: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(
        model=model, messages=messages, max_tokens=300, response_format=asked
    )
    found = json.loads(answer.choices[0].message.content or "")
    assert found["kind"] in ("list", "dict")
    assert isinstance(found["ok"], bool)
    tools: Any = [{"type": "function", "function": {"name": "look_up", "parameters": schema}}]
    answer = client.chat.completions.create(
        model=model, messages=messages, max_tokens=300, tools=tools, tool_choice="required",
        parallel_tool_calls=False,
    )  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "look_up"
    assert json.loads(call.function.arguments).keys() == {"kind", "ok"}


def test_a_streamed_chat(client: openai.OpenAI, model: str) -> None:
    messages: Any = [{"role": "user", "content": "What is a list?"}]
    chunks = list(
        client.chat.completions.create(
            model=model, messages=messages, max_tokens=16, temperature=0, stream=True
        )
    )
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert deltas[0].delta.role == "assistant"
    assert "".join(delta.delta.content or "" for delta in deltas).strip()
    assert [delta.finish_reason for delta in deltas][-1] in ("length", "stop")
    assert len({chunk.id for chunk in chunks}) == 1
    whole = client.chat.completions.create(model=model, messages=messages, max_tokens=16, temperature=0)
    assert whole.choices[0].message.content == "".join(delta.delta.content or "" for delta in deltas)


def test_each_request_leaves_a_line(client: openai.OpenAI, model: str, audit_log: Path) -> None:
    headers = {"x-request-id": "audited-1"}
    whole = {"ignore_eos": True}  # it is drawn, and may end sooner
    client.completions.create(
        model=model, prompt=PROMPT, max_tokens=4, extra_headers=headers, extra_body=whole
    )

    def line() -> dict[str, Any] | None:
        lines = map(json.loads, audit_log.read_text().splitlines() if audit_log.exists() else [])
        return next((one for one in lines if one["request_id"] == "audited-1"), None)

    wait_for(lambda: line() is not None, 30)
    found = line()
    assert found is not None
    assert (found["endpoint"], found["status"], found["output_tokens"]) == ("/v1/completions", 200, 4)
    assert PROMPT not in audit_log.read_text()


def test_a_flood_of_headers(url: str) -> None:
    """Ours where HAProxy lets it through, else HAProxy's."""
    ours = httpx.get(f"{url}/health", headers={"x-long": "a" * 14_500})
    assert (ours.status_code, ours.json()["error"]["code"]) == (431, "headers_too_large")
    for headers in ({"x-long": "a" * 100_000}, {f"x-{i}": "a" for i in range(300)}):
        assert httpx.get(f"{url}/health", headers=headers).status_code == 400


def test_headers_that_come_a_byte_at_a_time(url: str) -> None:
    """HAProxy reads them before a router is asked; what it has no time for is cut off."""
    host, port = url.removeprefix("http://").split(":")
    begun, answer = time.monotonic(), b""
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nx-slow: ")
        sock.settimeout(0.5)
        while not answer:
            assert time.monotonic() - begun < RECEIVE_S + 60
            sock.sendall(b"a")
            with contextlib.suppress(TimeoutError):
                answer = sock.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_body_that_does_not_come(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=RECEIVE_S + 60) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        answer = b""
        while b"request_timeout" not in answer and (part := sock.recv(65536)):  # the body may come apart
            answer += part
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in answer


def test_the_terminal_chat(url: str) -> None:
    command = [ELLM, "chat", "--url", url, "--max-tokens", "8", "--temperature", "0"]
    done = subprocess.run(command, input="What is a list?\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_status_names_the_workers_and_their_processes(url: str) -> None:
    workers = ready_workers(url)
    assert [worker["id"] for worker in workers] == ["w0", "w1"]
    for worker in workers:
        assert {"node", "num_running", "num_waiting", "free_blocks", "num_blocks"} <= set(worker)
        assert all(process_alive(pid) for pid in worker["rank_pids"])
    pids = [pid for worker in workers for pid in worker["rank_pids"]]
    assert len(set(pids)) == 2


def test_a_stream_survives_the_death_of_its_worker(client: openai.OpenAI, model: str, url: str) -> None:
    num_tokens = 1200
    calm = "".join(chunk.choices[0].text for chunk in long_stream(client, model, num_tokens))
    texts: list[str] = []
    finish = None
    killed = None
    for chunk in long_stream(client, model, num_tokens):
        texts.append(chunk.choices[0].text)
        finish = chunk.choices[0].finish_reason or finish
        if killed is None and len(texts) >= 3:
            # The router's own table is a heartbeat old: take the worker that is busy.
            busy = [worker for worker in status(url) if worker["num_here"] > 0]
            assert busy, "the stream ended before its worker could be found"
            (killed,) = busy[0]["rank_pids"]
            os.kill(killed, signal.SIGKILL)
    assert killed is not None
    assert "".join(texts) == calm
    assert finish == "length"
    assert not process_alive(killed)
    wait_for(lambda: len(ready_workers(url)) == 2, 120)  # Serve has started a new one
    assert killed not in [pid for worker in status(url) for pid in worker["rank_pids"]]


def test_ctrl_c_lets_a_stream_end_and_leaves_nothing(
    server: Served, client: openai.OpenAI, model: str, url: str
) -> None:
    started = threading.Event()
    texts: list[str] = []
    finish: list[str] = []

    def read() -> None:
        for chunk in long_stream(client, model, 600):
            texts.append(chunk.choices[0].text)
            finish.extend([chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else [])
            started.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(60)
    assert len(server.processes()) > 5
    server.signal(signal.SIGINT)
    code = server.wait()
    reader.join(10)
    assert code == 0, server.output
    assert finish == ["length"]
    assert server.processes() == []
    assert "Traceback" not in server.output
