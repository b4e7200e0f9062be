"""What the Prometheus operator and Grafana's sidecar find: monitors, rules, dashboards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import pytest
import yaml
from support.chart import CHART, NAMESPACE, RELEASE, VALUES, Rendered, render
from support.kuberay import kubernetes_problems

TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
MONITOR = {
    "type": "object",
    "additionalProperties": False,
    "required": ["selector", "podMetricsEndpoints"],
    "properties": {
        "selector": {"type": "object"},
        "podMetricsEndpoints": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["port"],
                "properties": {
                    "port": {"type": "string"},
                    "path": {"type": "string"},
                    "interval": {"type": "string"},
                    "authorization": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {"credentials": TEXTS},
                    },
                },
            },
        },
    },
}
RULE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["expr"],
    "properties": {
        **{key: {"type": "string"} for key in ("record", "alert", "expr", "for", "keep_firing_for")},
        "labels": TEXTS,
        "annotations": TEXTS,
    },
}
GROUP = {
    "type": "object",
    "required": ["name", "rules"],
    "properties": {"name": {"type": "string"}, "rules": {"type": "array", "items": RULE}},
}
RULES = {
    "type": "object",
    "additionalProperties": False,
    "required": ["groups"],
    "properties": {"groups": {"type": "array", "items": GROUP}},
}
ON = {"prometheusRule": {"enabled": True}, "grafana": {"dashboard": {"enabled": True}}}
ALERT = {"alert": "Dead", "expr": "up == 0", "annotations": {"summary": "{{ $labels.pod }} is down"}}
DASHBOARD = {"title": "Overview", "panels": [{"title": "{{instance}}", "targets": [{"expr": 'x{a="b"}'}]}]}


@pytest.fixture
def with_files(tmp_path: Path) -> Path:
    """The chart with rules and two dashboards of known contents."""
    copy = tmp_path / "helm"
    shutil.copytree(CHART, copy, ignore=shutil.ignore_patterns("files"))
    (copy / "files/dashboards").mkdir(parents=True)
    (copy / "files/alerts.yaml").write_text(yaml.safe_dump({"groups": [{"name": "ellm", "rules": [ALERT]}]}))
    for name in ("overview", "Worker_Memory"):
        (copy / f"files/dashboards/{name}.json").write_text(json.dumps(DASHBOARD, indent=2))
    return copy


def rendered(folder: Path, values: dict[str, Any]) -> Rendered:
    with helm_python.Chart.load(str(folder)) as chart:
        return Rendered(chart.render(values, name=RELEASE, namespace=NAMESPACE))


def test_rules_and_dashboards_arrive_as_they_are(with_files: Path) -> None:
    found = rendered(with_files, ON)
    spec = found.one("PrometheusRule")["spec"]
    jsonschema.validate(spec, RULES)
    assert spec["groups"][0]["rules"] == [ALERT]
    boards = found.resources("ConfigMap")
    assert {board["metadata"]["name"] for board in boards} == {"llm-ellm-overview", "llm-ellm-worker-memory"}
    for board in boards:
        (content,) = board["data"].values()
        assert json.loads(content) == DASHBOARD
        assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert kubernetes_problems(board) == []
    elsewhere = {**ON, "grafana": {"dashboard": {"enabled": True, "namespace": "monitoring"}}}
    boards = rendered(with_files, elsewhere).resources("ConfigMap")
    assert {board["metadata"].get("namespace") for board in boards} == {"monitoring"}


def test_they_are_off_unless_asked_for_and_may_be_missing(with_files: Path) -> None:
    assert rendered(with_files, {}).resources("PrometheusRule") == []
    assert rendered(with_files, {}).resources("ConfigMap") == []
    shutil.rmtree(with_files / "files")
    assert rendered(with_files, ON).resources("PrometheusRule") == []


def test_what_the_chart_ships_is_taken() -> None:
    found = render(ON)
    for rule in found.resources("PrometheusRule"):
        jsonschema.validate(rule["spec"], RULES)
    files = sorted(path.name for path in (CHART / "files/dashboards").glob("*.json"))
    assert sorted(name for board in found.resources("ConfigMap") for name in board["data"]) == files
    assert len(found.resources("PrometheusRule")) == (CHART / "files/alerts.yaml").exists()


def test_every_pod_is_scraped_and_the_cluster_once() -> None:
    found = render({"podMonitor": {"enabled": True, "labels": {"release": "prometheus"}}})
    for monitor in found.resources("PodMonitor"):
        jsonschema.validate(monitor["spec"], MONITOR)
        assert monitor["metadata"]["labels"]["release"] == "prometheus"
    ray, ours = found.one("PodMonitor", "llm-ellm-ray"), found.one("PodMonitor", "llm-ellm")
    (expression,) = ray["spec"]["selector"]["matchExpressions"]
    assert expression["values"] == ["head", "router", "worker"]
    assert ours["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"] == "head"
    assert ours["spec"]["podMetricsEndpoints"] == [{"port": "serve", "path": "/metrics", "interval": "15s"}]
    for group in found.groups:
        assert {"metrics", "serve"} <= {port["name"] for port in found.container(group)["ports"]}
    assert render().resources("PodMonitor") == []


def test_the_scrape_brings_the_admin_key() -> None:
    monitor = render(VALUES["values-h100-tp2"]).one("PodMonitor", "llm-ellm")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"] == {"credentials": {"name": "ellm-admin", "key": "admin-key"}}
