"""A real Prometheus over a real cluster of two routers and two workers: every metric is there and adds up,
every query of the dashboards has an answer, and alerts fire when the fault is made.

The tests share one server and run in their order: first a little load, then too much, then the dead.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.prometheus import Prometheus, prometheus
from support.served import Served, served, wait_for
from support.tree import ROOT

from ellm.deploy.ports import free_ports
from ellm.router.metrics_declared import HISTOGRAMS
from ellm.router.metrics_reference import DERIVED
from ellm.router.metrics_sharing import DECLARED
from ellm.worker.api.metrics import GAUGES

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(500),
    pytest.mark.needs_tool("prometheus"),
    pytest.mark.needs_tool("promtool"),
]

KEY, ADMIN = "sk-monitoring", "sk-monitoring-admin"
MODEL = "simulated"
HEADERS = {"authorization": f"Bearer {KEY}"}
ADMIN_HEADERS = {"authorization": f"Bearer {ADMIN}"}
QUERIES = sorted(
    (path.stem, panel["title"], target["expr"])
    for path in (ROOT / "helm" / "files" / "dashboards").glob("*.json")
    for panel in json.loads(path.read_text())["panels"]
    for target in panel["targets"]
)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    (port,) = free_ports(1)
    flags = ["simulated:overhead_s=0.01", "--port", str(port), "--workers", "2", "--kv-blocks", "512"]
    for setting in (
        *("router.num_replicas=2", f'router.api_keys=["{KEY}"]', f"router.admin_key={ADMIN}"),
        *("worker.scheduler.max_num_seqs=4", "worker.scheduler.max_waiting=4"),
        *("worker.scheduler.tpot_slo_ms=500", "worker.scheduler.ttft_slo_ms=2000"),
        *("cluster.log_format=json", "router.failover.hold_s=60"),
    ):
        flags += ["--set", setting]
    with served(*flags) as made:
        made.wait_until_ready()
        yield made


@pytest.fixture(scope="module")
def url(server: Served) -> str:
    return server.wait_until_ready()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=90, headers=HEADERS) as made:
        yield made


def below(server: Served, word: str) -> list[psutil.Process]:
    """Processes of the cluster with a word in their name or arguments."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if word in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def session(server: Served) -> Path:
    """Ray's folder of this cluster."""
    words = " ".join(below(server, "session_dir=")[0].cmdline()).replace("=", " ").split()
    return Path(words[words.index("--session_dir") + 1])


@pytest.fixture(scope="module")
def observed(url: str, session: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    (port,) = (path.read_text().strip() for path in session.glob("metrics_export_port_*"))
    targets = [("ellm", url.removeprefix("http://"), 2), ("ray", f"127.0.0.1:{port}", 6)]
    with prometheus(tmp_path_factory.mktemp("prometheus"), targets, ADMIN) as made:
        made.wait_for('up{job="ellm"}')
        yield made


def complete(client: httpx.Client, max_tokens: int = 8, **more: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": "a b c", "max_tokens": max_tokens, "ignore_eos": True, **more}
    return client.post("/v1/completions", json=body)


def test_every_metric_of_the_reference_is_there(client: httpx.Client, observed: Prometheus) -> None:
    for number in range(12):
        assert complete(client, prompt=f"a b {number}").status_code == 200
    observed.wait_for("ellm_routers == 2")
    # Both routers' counts, whichever is asked.
    observed.wait_for('sum(ellm_request_success_total{finished_reason="length"}) == 12')
    observed.wait_for("sum(ellm_generation_tokens_total) == 96")
    names = observed.names("ellm_.+")
    wanted = {metric.name + ("_bucket" if metric.kind == "histogram" else "") for metric in DECLARED}
    assert wanted - names == set()
    assert observed.value("ellm_metrics_complete") == 1
    assert observed.value('sum(ellm_workers{state="ready"})') == 2


def test_the_page_is_clean(url: str) -> None:
    assert httpx.get(f"{url}/metrics", headers=HEADERS).status_code == 401
    text = httpx.get(f"{url}/metrics", headers=ADMIN_HEADERS).text
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def unanswered(observed: Prometheus, prefix: str) -> list[tuple[str, str, str]]:
    """Queries of the dashboards that bring nothing: (dashboard, panel, query as it was asked)."""
    assert len(QUERIES) > 60
    empty = []
    for dashboard, title, query in QUERIES:
        filled = query.replace("${prefix}", prefix).replace("$__rate_interval", "1m")
        filled = filled.replace("$model", ".*").replace("$worker", ".*")
        assert "$" not in filled, filled
        if not observed.query(filled):
            empty.append((dashboard, title, filled))
    return empty


def test_every_query_of_the_dashboards_has_an_answer(observed: Prometheus) -> None:
    assert unanswered(observed, "ellm") == []


def test_a_request_is_followed_from_any_router(client: httpx.Client, url: str, session: Path) -> None:
    ident = complete(client).headers["x-request-id"]
    with httpx.Client(base_url=url, timeout=30, headers=ADMIN_HEADERS) as admin:
        for _ in range(6):  # the ingress asks either
            found = admin.get(f"/admin/requests/{ident}")
            assert found.status_code == 200, found.text
            (choice,) = found.json()["choices"]
            events = [event["event"] for event in choice["events"]]
            assert events == ["queued", "sent", "prefill", "first_token", "done"]
        assert admin.get("/admin/requests/unknown").status_code == 404

    def lines() -> list[dict[str, Any]]:
        texts = [path.read_text(errors="replace") for path in session.glob("logs/worker-*.err")]
        found = [
            line for text in texts for line in text.splitlines() if ident in line and "ellm.router" in line
        ]
        return [json.loads(line) for line in found]

    wait_for(lambda: lines(), 20)
    (line,) = lines()
    assert (line["request_id"], line["process"], line["num_output_tokens"]) == (ident, "router", 8)
    assert line["worker"] in ("w0", "w1")


def test_too_much_load_fires_its_alerts(url: str, observed: Prometheus) -> None:
    assert not observed.fired() & {"EllmOverloaded", "EllmSloBurnFast", "EllmWorkerLost"}
    stop = threading.Event()

    def press() -> None:
        with httpx.Client(base_url=url, timeout=90, headers=HEADERS) as mine:
            while not stop.is_set():
                if complete(mine, 40, ttft_slo_ms=1).status_code != 200:
                    stop.wait(0.05)

    threads = [threading.Thread(target=press) for _ in range(40)]
    for thread in threads:
        thread.start()
    try:
        observed.wait_for_alert("EllmOverloaded")
        observed.wait_for_alert("EllmSloBurnFast")
    finally:
        stop.set()
        for thread in threads:
            thread.join(100)


def test_ray_exports_the_same_metrics(observed: Prometheus) -> None:
    wanted = {f"ray_{metric.name}" for metric, _ in GAUGES} | {f"ray_{m.name}_bucket" for m in HISTOGRAMS}
    wanted |= {
        "ray_ellm_generation_tokens_total",
        "ray_ellm_request_success_total",
        "ray_ellm_workers_wanted",
    }
    wait_for(lambda: wanted <= observed.names("ray_ellm_.+"), 60)  # Ray's own period is ten seconds
    assert (observed.value("sum(ray_ellm_steps_total)") or 0) > 0

    def left() -> list[tuple[str, str, str]]:
        """But for what only a scrape of the whole cluster can know."""
        found = unanswered(observed, "ray_ellm")
        return [entry for entry in found if not any(f"ray_{name}" in entry[2] for name in DERIVED)]

    wait_for(lambda: not left(), 60)
    assert left() == []


def test_a_dead_worker_fires_and_nothing_runs_backwards(
    server: Served, client: httpx.Client, observed: Prometheus
) -> None:
    def counted() -> float:
        """By the page itself, which knows it sooner than Prometheus."""
        page = client.get("/metrics", headers=ADMIN_HEADERS)
        assert page.status_code == 200
        name = "ellm_generation_tokens_total{"
        return sum(float(line.split()[-1]) for line in page.text.splitlines() if line.startswith(name))

    start = counted()
    assert complete(client).status_code == 200
    wait_for(lambda: counted() >= start + 8, 30)  # with the worker's next report
    before = counted()
    lost = observed.value("sum(ellm_workers_lost_total)") or 0
    router = below(server, "ServeReplica:ellm:Router")[0]
    os.kill(below(server, "RankActor")[0].pid, signal.SIGKILL)
    observed.wait_for_alert("EllmWorkerLost")
    observed.wait_for_alert("EllmWorkersMissing")
    observed.wait_for(f"sum(ellm_workers_lost_total) == {lost + 1}")  # however many routers saw it
    os.kill(router.pid, signal.SIGKILL)

    def answered() -> bool:
        try:
            return complete(client).status_code == 200
        except httpx.TransportError:  # a connection to the router that died
            return False

    wait_for(answered, 90)
    observed.wait_for(f"sum(ellm_generation_tokens_total) >= {before + 8}", 120)
    assert observed.value("sum(ellm_workers_lost_total)") == lost + 1
    counters = observed.names("ellm_.+(_total|_bucket|_count|_sum)")
    assert len(counters) > 40
    assert [name for name in sorted(counters) if observed.query(f"resets({name}[1h]) > 0")] == []
