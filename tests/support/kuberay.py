"""KubeRay's RayService, as far as the chart has anything to say about it.

`kuberay_rayservice.json` is made from KubeRay's CustomResourceDefinition (ray.io/v1): without descriptions,
without the parts that the chart leaves alone, and strict: the API server drops an unknown field without a
word, here it is an error. Pod templates are left to the Kubernetes schemas. To make it anew, and to check the
chart against the whole definition:

    python tests/support/kuberay.py ray.io_rayservices.yaml
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

KUBERNETES = "1.30.0"
REDUCED = Path(__file__).with_name("kuberay_rayservice.json")
POD = {"x-pod-template": True}
LEFT_ALONE = {
    "status",
    "serveService",
    "headService",
    "historyServerOptions",
    "networkPolicy",
    "managedBy",
    "ingressOptions",
    "env",
    "envFrom",
    "volumeMounts",
}


def problems(resource: dict[str, Any]) -> list[str]:
    """What is wrong with a RayService, its pods included."""
    found = [f"{error.json_path}: {error.message}" for error in _reduced().iter_errors(resource)]
    cluster = resource["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
        found += kubernetes_problems(pod)
    return found


def kubernetes_problems(resource: dict[str, Any]) -> list[str]:
    """What is wrong with a resource of Kubernetes itself."""
    try:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{resource['kind']}: {'.'.join(map(str, error.path))}: {error.message}"]
    return []


@cache
def _reduced() -> jsonschema.Draft202012Validator:
    return _validator(json.loads(REDUCED.read_text()))


def _validator(schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema)


def whole(definition: dict[str, Any]) -> dict[str, Any]:
    """The definition's schema as jsonschema reads it, all of it."""
    (version,) = (item for item in definition["spec"]["versions"] if item["name"] == "v1")
    return _plain(version["schema"]["openAPIV3Schema"], frozenset())


def reduced(definition: dict[str, Any]) -> dict[str, Any]:
    (version,) = (item for item in definition["spec"]["versions"] if item["name"] == "v1")
    schema = _plain(version["schema"]["openAPIV3Schema"], frozenset(LEFT_ALONE))
    schema["properties"]["metadata"] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "properties": {
            "name": {"type": "string", "maxLength": 47},
            **{key: {"type": "object"} for key in ("labels", "annotations")},
        },
    }
    return {"$comment": "From KubeRay's RayService definition, Apache-2.0. Made by kuberay.py.", **schema}


def _plain(node: Any, left_alone: frozenset[str]) -> Any:
    """Without what only the API server reads. With parts to leave alone also strict, and without pods."""
    if isinstance(node, list):
        return [_plain(item, left_alone) for item in node]
    if not isinstance(node, dict):
        return node
    made = {
        key: _plain(value, left_alone)
        for key, value in node.items()
        if key not in ("description", "format") and not key.startswith("x-kubernetes")
    }
    if node.get("x-kubernetes-int-or-string"):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    if isinstance(node.get("properties"), dict):
        kept = {key: value for key, value in node["properties"].items() if key not in left_alone}
        if left_alone:
            kept = {key: POD if key == "template" else value for key, value in kept.items()}
            made["additionalProperties"] = False
        made["properties"] = {
            key: value if value is POD else _plain(value, left_alone) for key, value in kept.items()
        }
    return made


def main(path: str) -> None:
    from support.chart import VALUES, render

    definition = yaml.load(Path(path).read_text(), Loader=yaml.CSafeLoader)
    REDUCED.write_text(json.dumps(reduced(definition), indent=1, sort_keys=True) + "\n")
    validator = _validator(whole(definition))
    for name, values in VALUES.items():
        for resource in render(values).resources("RayService"):
            validator.validate(resource)
            sys.stderr.write(f"{name}: the whole definition takes it\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(sys.argv[1])
