"""The Helm chart, rendered in this process as `helm template` does it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache, cached_property
from typing import Any

import helm_python
import yaml
from support.tree import ROOT

CHART = ROOT / "helm"
RELEASE, NAMESPACE = "llm", "serving"


def _values() -> dict[str, dict[str, Any]]:
    files = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CHART.glob("values-*.yaml"))}
    return {"values": {}, **files}


VALUES = _values()  # name of the file -> what it gives


class Rendered:
    """Not to be changed: it is shared."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts = texts  # by the template's path

    @cached_property
    def all(self) -> list[dict[str, Any]]:
        found = []
        for path, text in self.texts.items():
            if path.endswith(".yaml"):
                found += [item for item in yaml.load_all(text, Loader=yaml.CSafeLoader) if item]
        return found

    def resources(self, kind: str) -> list[dict[str, Any]]:
        return [item for item in self.all if item["kind"] == kind]

    def one(self, kind: str, name: str = "") -> dict[str, Any]:
        (found,) = (item for item in self.resources(kind) if name in ("", item["metadata"]["name"]))
        return found

    @property
    def ray_service(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.one("RayService")["spec"]
        return spec

    @property
    def serve_config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load(self.ray_service["serveConfigV2"])
        return config

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """The head and the worker groups, by name."""
        cluster = self.ray_service["rayClusterConfig"]
        return {
            "head": cluster["headGroupSpec"],
            **{group["groupName"]: group for group in cluster["workerGroupSpecs"]},
        }

    def pod(self, group: str) -> dict[str, Any]:
        spec: dict[str, Any] = self.groups[group]["template"]["spec"]
        return spec

    def container(self, group: str) -> dict[str, Any]:
        (container,) = self.pod(group)["containers"]
        return dict(container)


@cache
def chart() -> helm_python.Chart:
    return helm_python.Chart.load(str(CHART))


def render(values: Mapping[str, Any] | None = None) -> Rendered:
    """Raises HelmError for values that the schema or a template refuses."""
    return _render(json.dumps(values or {}))


@cache
def _render(values: str) -> Rendered:
    return Rendered(chart().render(json.loads(values), name=RELEASE, namespace=NAMESPACE))


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """As several `-f`: later wins, key by key."""
    made: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = made.get(key)
            both = isinstance(old, Mapping) and isinstance(value, Mapping)
            made[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return made
