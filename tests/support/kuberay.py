"""KubeRay's RayService, held against KubeRay's own CustomResourceDefinition (ray.io/v1).

The definition is not part of this project: `KUBERAY_CRDS` names a folder with KubeRay's
`ray.io_rayservices.yaml`. Here it is read strictly: the API server drops an unknown field without a word,
in a test it is an error. Pod templates are left to the Kubernetes schemas.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

KUBERNETES = "1.30.0"
CRDS = "KUBERAY_CRDS"
FILE = "ray.io_rayservices.yaml"
POD = {"x-pod-template": True}


def problems(resource: dict[str, Any]) -> list[str]:
    """What is wrong with a RayService, its pods included; without the definition, with its pods alone."""
    found = []
    if os.environ.get(CRDS):
        found += [f"{error.json_path}: {error.message}" for error in _definition().iter_errors(resource)]
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
def _definition() -> jsonschema.Draft202012Validator:
    definition = yaml.load((Path(os.environ[CRDS]) / FILE).read_text(), Loader=yaml.CSafeLoader)
    (version,) = (item for item in definition["spec"]["versions"] if item["name"] == "v1")
    schema = _plain(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "properties": {
            "name": {"type": "string", "maxLength": 47},
            **{key: {"type": "object"} for key in ("labels", "annotations")},
        },
    }
    return jsonschema.Draft202012Validator(schema)


def _plain(node: Any) -> Any:
    """Without what only the API server reads, strict, and without pods."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {
        key: _plain(value)
        for key, value in node.items()
        if key not in ("description", "format") and not key.startswith("x-kubernetes")
    }
    if node.get("x-kubernetes-int-or-string"):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    if isinstance(node.get("properties"), dict):
        made["additionalProperties"] = False
        made["properties"] = {
            key: POD if key == "template" else _plain(value) for key, value in node["properties"].items()
        }
    return made
