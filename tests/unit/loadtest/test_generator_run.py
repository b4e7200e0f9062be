"""`ellm bench` as a person runs it, against our own router over HTTP and gRPC, and against nothing."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.router_server import EchoWorker, RouterServer
from support.tree import ROOT

from ellm.deploy.cli import main
from ellm.loadtest.generator.check import checked_target
from ellm.loadtest.generator.options import Options
from ellm.loadtest.generator.run import run_once
from ellm.router.config import RouterConfig

FAST = ("--rate", "50", "--num-requests", "12", "--input-tokens", "24", "--output-tokens", "6", "--quiet")
TOKENIZER = str(ROOT / "deploy" / "bundled" / "pydoc-5m")


@pytest.fixture(scope="module")
def server() -> Iterator[RouterServer]:
    config = replace(RouterConfig(refresh_s=0.05), admin_key=None)
    with RouterServer([EchoWorker(0)], config, grpc=True) as server:
        yield server


def bench(tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    assert main(["bench", *words, "--json", str(out)]) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def test_over_http_with_a_report_and_the_workers_memory(
    server: RouterServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    slow = ("--rate", "10", "--warmup", "2", "--tokenizer", TOKENIZER, "--html", str(page))
    limits = ("--ttft-slo-ms", "60000", "--tpot-slo-ms", "60000")
    result = bench(tmp_path, "--url", server.url, *FAST, *slow, *limits)
    s = result["summary"]
    assert (s["completed"], s["failed"], s["cancelled"]) == (12, 0, 0)
    assert s["output_tokens"] == 72
    assert s["input_tokens"] == 12 * 24  # every word is one token, and the server agrees
    assert s["slo_attainment"] == 1.0
    assert s["goodput_req_s"] == pytest.approx(s["completed_req_s"])
    assert 0.0 < s["ttft_mean_s"] <= s["e2e_mean_s"]
    assert {row["worker"] for row in result["workers"]} == {"w0"}
    assert "Memory of the workers" in page.read_text()
    assert "12 completed, 0 failed" in capsys.readouterr().out


def test_over_grpc_tokens_are_exact(server: RouterServer, tmp_path: Path) -> None:
    result = bench(tmp_path, "--url", f"grpc://127.0.0.1:{server.rpc.port}", *FAST, "--prompt-ids")
    assert result["summary"]["completed"] == 12
    for request in result["requests"]:
        assert (request["prompt_tokens"], request["output_tokens"]) == (24, 6)
        assert sum(request["chunk_tokens"]) == 6
        assert len(request["chunk_tokens"]) == len(request["chunk_offsets_s"])


@pytest.mark.parametrize("over", ["http", "grpc"])
def test_conversations_carry_what_was_said(server: RouterServer, tmp_path: Path, over: str) -> None:
    url = server.url if over == "http" else f"grpc://127.0.0.1:{server.rpc.port}"
    result = bench(tmp_path, "--url", url, "--chat", *FAST, "--turns", "3", "--think-s", "0.01",
                   "--shared-prompts", "1", "--shared-tokens", "40")  # fmt: skip
    assert result["summary"]["completed"] == 36
    sessions: dict[int, list[Any]] = {}
    for request in result["requests"]:
        sessions.setdefault(request["session"], []).append(request)
    for turns in sessions.values():
        assert [turn["turn"] for turn in turns] == [0, 1, 2]
        lengths = [turn["prompt_tokens"] for turn in turns]
        assert lengths[0] < lengths[1] < lengths[2]
        assert all(later["due_s"] >= earlier["end_s"] for earlier, later in pairwise(turns))
    assert result["summary"]["cached_tokens"] > 0  # the system prompt and the turns before


@pytest.mark.parametrize("over", ["http", "grpc"])
def test_clients_that_leave_are_counted_apart(server: RouterServer, tmp_path: Path, over: str) -> None:
    url = server.url if over == "http" else f"grpc://127.0.0.1:{server.rpc.port}"
    words = (*FAST, "--num-requests", "6", "--output-tokens", "1900", "--prompt-ids")
    s = bench(tmp_path, "--url", url, *words, "--cancel", "1", "--cancel-after-s", "0.01")["summary"]
    assert s["cancelled"] >= 5  # one may be done before its client has left
    assert s["cancelled"] + s["completed"] == 6


def test_two_processes_share_one_plan(server: RouterServer) -> None:
    options = Options(
        server.url, rate=100.0, num_requests=9, input_tokens="8", output_tokens="2", processes=2
    )
    run = run_once(options, checked_target(options))
    assert run.processes == 2
    assert sorted(record.index for record in run.records) == list(range(9))
    assert all(record.outcome == "completed" for record in run.records)


def test_ctrl_c_keeps_what_there_is(server: RouterServer) -> None:
    options = Options(server.url, rate=20.0, num_requests=10_000, input_tokens="8", output_tokens="2")
    pressed: list[int] = []

    def press(progress: Any) -> None:
        if progress.completed >= 3 and not pressed:
            pressed.append(progress.completed)
            signal.raise_signal(signal.SIGINT)

    run = run_once(options, checked_target(options), on_progress=press)
    assert run.interrupted
    assert pressed[0] <= sum(record.outcome == "completed" for record in run.records) < 10_000


def test_a_sweep_and_a_search(
    server: RouterServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--num-requests", "3", "--input-tokens", "8", "--output-tokens", "2", "--quiet")
    swept = bench(
        tmp_path, "--url", server.url, *few, "--sweep", "rate=20,40", "--html", str(tmp_path / "s.html")
    )
    assert [result["options"]["rate"] for result in swept["sweep"]] == [20.0, 40.0]
    never = ("--rate", "0.001", "--arrivals", "constant", "--num-requests", "1", "--e2e-slo-ms", "1e-6")
    found = bench(tmp_path, "--url", server.url, *few, *never, "--search", "90")
    assert found["highest_rate_req_s"] == {"90": None}
    assert "no rate that was tried" in capsys.readouterr().out


def test_two_results_side_by_side(
    server: RouterServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench(tmp_path, "--url", server.url, *FAST)
    path = str(tmp_path / "out.json")
    assert main(["bench", "--compare", path, path, "--html", str(tmp_path / "c.html")]) == 0
    out = capsys.readouterr().out
    assert "1.000" in out
    assert "not the same" not in out


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--url", "http://127.0.0.1:{free}", "--rate", "1"), 1, "cannot reach"),
        (("--url", "grpc://127.0.0.1:{free}", "--rate", "1"), 1, "UNAVAILABLE"),
        (("--url", "{http}", "--rate", "1", "--model", "gpt-9"), 1, "has no model 'gpt-9'; it has pydoc-5m"),
        (("--url", "grpc://127.0.0.1:{grpc}", "--rate", "1", "--model", "gpt-9"), 1, "has no model 'gpt-9'"),
        (("--url", "{http}/elsewhere", "--rate", "1"), 1, "/elsewhere/v1/models is not there"),
        (("--url", "ftp://127.0.0.1", "--rate", "1"), 2, "expected http://"),
        (("--url", "http://127.0.0.1:99999", "--rate", "1"), 2, "--url"),
        (("--url", "http://no-such-host.invalid", "--rate", "1"), 1, "there is no host"),
        (("--url", "{http}", "--rate", "0"), 2, "--rate must be above 0"),
        (
            (
                "--url",
                "{http}",
            ),
            2,
            "needs --rate",
        ),
        (("--rate", "1"), 2, "--url is needed"),
        (("--url", "{http}", "--rate", "1", "--input-tokens", "many"), 2, "--input-tokens 'many' is none of"),
        (("--url", "{http}", "--rate", "1", "--extra-body", "[1]"), 2, "--extra-body"),
        (("--url", "{http}", "--rate", "1", "--extra-body", '{{"no_such_field": 1}}'), 1, "answers 400"),
        (("--url", "{http}", "--rate", "1", "--json", "no/such/folder/a.json"), 2, "there is no folder"),
        (("--url", "{http}", "--rate", "1", "--search"), 2, "--search needs an SLO"),
        (("--compare", "missing.json", "missing.json"), 2, "cannot read missing.json"),
    ],
)
def test_what_is_wrong_is_one_line(
    server: RouterServer, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, said: str
) -> None:
    filled = [word.format(free=free_port(), http=server.url, grpc=server.rpc.port) for word in words]
    assert main(["bench", *filled]) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_help_helps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    out = capsys.readouterr().out
    for word in ("--arrivals", "--search", "--compare", "lognormal:MEAN,SIGMA", "docs/bench.md", "examples:"):
        assert word in out
