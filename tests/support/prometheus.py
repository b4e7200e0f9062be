"""A real Prometheus over a server's metrics, with the project's alert rules, every second."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml
from support.tree import ROOT

from ellm.deploy.ports import free_ports

ALERTS = ROOT / "helm" / "files" / "alerts.yaml"
START_S = 60.0


class Prometheus:
    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=30)

    def close(self) -> None:
        self._client.close()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an instant query: [{"metric": labels, "value": [time, text]}, ...]."""
        response = self._client.get("/api/v1/query", params={"query": expression})
        assert response.status_code == 200, f"{expression}: {response.text}"
        result: list[dict[str, Any]] = response.json()["data"]["result"]
        return result

    def value(self, expression: str) -> float | None:
        """Of the first series; None where there is none."""
        found = self.query(expression)
        return float(found[0]["value"][1]) if found else None

    def names(self, pattern: str) -> set[str]:
        """Of the metrics that match and have a series now."""
        found = self.query(f'count by (__name__) ({{__name__=~"{pattern}"}})')
        return {entry["metric"]["__name__"] for entry in found}

    def fired(self) -> set[str]:
        """Alerts that have fired since the start."""
        found = self.query('max by (alertname) (max_over_time(ALERTS{alertstate="firing"}[1h]))')
        return {entry["metric"]["alertname"] for entry in found}

    def wait_for(self, expression: str, timeout_s: float = 60.0) -> float:
        """Until the query has a result that is not 0; returns its first value."""
        deadline = time.monotonic() + timeout_s
        while not (value := self.value(expression)):
            assert time.monotonic() < deadline, f"waited for {expression} in vain"
            time.sleep(0.2)
        return value

    def wait_for_alert(self, name: str, timeout_s: float = 90.0) -> None:
        deadline = time.monotonic() + timeout_s
        while name not in self.fired():
            assert time.monotonic() < deadline, f"{name} does not fire; others: {self.fired()}"
            time.sleep(0.2)


def hasty(rules: str) -> str:
    """The rules without their patience: what holds fires at once. promtool's tests check the rest."""
    return re.sub(r"\bfor: \w+", "for: 0s", rules)


@contextlib.contextmanager
def prometheus(
    folder: Path, targets: Sequence[tuple[str, str, int]], key: str | None = None
) -> Iterator[Prometheus]:
    """Scrapes (job, host:port, every so many seconds) into an empty folder; `key` goes along as a bearer."""
    (port,) = free_ports(1)
    (folder / "alerts.yaml").write_text(hasty(ALERTS.read_text()))
    jobs: list[dict[str, Any]] = [
        {
            "job_name": job,
            "static_configs": [{"targets": [address]}],
            "scrape_interval": f"{period_s}s",
            "scrape_timeout": f"{period_s}s",
        }
        | ({} if key is None else {"authorization": {"credentials": key}})
        for job, address, period_s in targets
    ]
    config = {
        "global": {"evaluation_interval": "1s"},
        "rule_files": ["alerts.yaml"],
        "scrape_configs": jobs,
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    command = [
        *(
            "prometheus",
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
        ),
        *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=error", "--web.enable-lifecycle"),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_S
        while not _answers(url):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "Prometheus did not start"
            time.sleep(0.05)
        made = Prometheus(url)
        yield made
        made.close()
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False
