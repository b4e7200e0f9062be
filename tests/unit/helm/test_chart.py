"""The chart as a whole: clean, repeatable, and what it renders is what Kubernetes and KubeRay take."""

from __future__ import annotations

import copy
import tomllib
from typing import Any

import helm_python
import pytest
import yaml
from support.chart import CHART, VALUES, Rendered, chart, render
from support.kuberay import CRDS, kubernetes_problems, problems
from support.tree import ROOT

PROMETHEUS = "monitoring.coreos.com/v1"
EVERYTHING = {
    "ingress": {"enabled": True},
    "podMonitor": {"enabled": True},
    "extraObjects": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "more"}}],
}
NEED_FILES = {"prometheusrule.yaml", "dashboards.yaml"}  # test_monitoring.py


def wrong(rendered: Rendered) -> list[str]:
    """What the schemas of Kubernetes say of all resources, and KubeRay's where it is at hand."""
    found = []
    for item in rendered.all:
        if item["apiVersion"] == "ray.io/v1":
            found += problems(item)
        elif item["apiVersion"] != PROMETHEUS:
            found += kubernetes_problems(item)
    return found


def test_the_linter_has_nothing_to_say() -> None:
    for values in VALUES.values():
        report = helm_python.lint(str(CHART), values, strict=True)
        assert report["errors"] == []
        assert [item for item in report["messages"] if item["severity"] > 1] == []


@pytest.mark.parametrize("name", VALUES)
def test_rendering_again_changes_nothing(name: str) -> None:
    first = render(VALUES[name]).texts
    assert first == render(copy.deepcopy(VALUES[name])).texts
    with helm_python.Chart.load(str(CHART)) as again:
        assert first == again.render(VALUES[name], name="llm", namespace="serving", is_upgrade=True)


@pytest.mark.parametrize("name", VALUES)
def test_kubernetes_takes_it(name: str) -> None:
    assert wrong(render(VALUES[name])) == []


@pytest.mark.needs_env(CRDS)
@pytest.mark.parametrize("name", VALUES)
def test_kuberay_takes_it(name: str) -> None:
    assert problems(render(VALUES[name]).one("RayService")) == []


def test_kubernetes_takes_what_the_examples_leave_out() -> None:
    assert wrong(render(EVERYTHING)) == []


def test_every_template_renders_something() -> None:
    texts = render(EVERYTHING).texts
    for template in (CHART / "templates").rglob("*.*"):
        name = template.relative_to(CHART).as_posix()
        if template.suffix == ".yaml" and template.name not in NEED_FILES:
            assert texts[f"ellm/{name}"].strip(), name


def test_names_are_unique_and_short_enough() -> None:
    for values in VALUES.values():
        rendered = Rendered(
            chart().render(values, name="a-release-name-of-53-characters-which-is-the-most-h")
        )
        names = [(item["kind"], item["metadata"]["name"]) for item in rendered.all]
        assert len(names) == len(set(names))
        assert all(len(name) <= 63 for _, name in names)
        assert problems(rendered.one("RayService")) == []


@pytest.mark.needs_env(CRDS)
@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("upgradeStrategie",), {}, "upgradeStrategie"),
        (("rayClusterDeletionDelaySeconds",), "soon", "'soon'"),
        (("rayClusterConfig", "authOptions", "mode"), "password", "password"),
        (("rayClusterConfig", "gcsFaultToleranceOptions", "redisAdress"), "x:1", "redisAdress"),
        (("rayClusterConfig", "workerGroupSpecs", 0, "maxReplica"), 3, "maxReplica"),
        (("rayClusterConfig", "headGroupSpec", "rayStartParams", "num-cpus"), 0, "is not of type 'string'"),
        (("rayClusterConfig", "headGroupSpec", "template", "spec", "contaners"), [], "contaners"),
    ],
)
def test_a_mistake_in_a_template_would_be_found(path: tuple[Any, ...], value: object, says: str) -> None:
    resource = copy.deepcopy(render().one("RayService"))
    place = resource["spec"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (problem,) = problems(resource)
    assert says in problem


def test_versions_are_those_of_the_package_and_its_pins() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert about["appVersion"] == project["version"]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert render().ray_service["rayClusterConfig"]["rayVersion"] == pins["ray"]
    compose = (ROOT / "deploy/docker/compose.yaml").read_text()
    assert f"ellm-on-ray:{project['version']}-" in compose
