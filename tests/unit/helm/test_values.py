"""Values that cannot be are refused by name: by the schema, or by a template where several do not agree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from helm_python import HelmError
from support.chart import CHART, VALUES, merged, render

from ellm.deploy import chart_schema
from ellm.deploy.tree import ALIASES

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
DEFAULTS: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
CUDA = {"model": {"path": "/models/llama", "device": "cuda", "tensorParallelSize": 2}}


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return SCHEMA["definitions"][reference.rpartition("/")[2]] if reference else schema


def closed(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping whose keys the schema lists."""
    schema = resolved(schema)
    if "properties" in schema:
        yield path, schema
        for key, value in schema["properties"].items():
            yield from closed(value, f"{path}.{key}")
    if "items" in schema:
        yield from closed(schema["items"], f"{path}[]")


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(HelmError) as raised:
        render(values)
    return str(raised.value)


def test_no_mapping_takes_an_unknown_key() -> None:
    mappings = dict(closed(SCHEMA))
    assert len(mappings) > 30
    assert [
        path for path, schema in mappings.items() if schema.get("additionalProperties") is not False
    ] == []


def test_the_schema_and_the_defaults_have_the_same_keys() -> None:
    def keys(data: dict[str, Any], schema: dict[str, Any], path: str) -> None:
        properties = resolved(schema).get("properties")
        if properties is None or path == ".config":
            return
        missing = set(properties) - set(data) - {"global", "initialDelaySeconds", "successThreshold"}
        if path not in (".affinity", ".model.config") and not path.endswith("affinity"):
            assert not missing, f"{path}: {missing} are not in values.yaml"
        for key, value in data.items():
            assert key in properties, f"{path}.{key} is not in the schema"
            if isinstance(value, dict):
                keys(value, properties[key], f"{path}.{key}")

    keys(DEFAULTS, SCHEMA, "")


def test_the_settings_are_those_of_the_configuration_tree() -> None:
    assert chart_schema.FILE.read_text() == chart_schema.text(), (
        "python -m ellm.deploy.chart_schema makes it anew"
    )
    # What is left out, the chart sets.
    args = render({"auth": {"apiKeys": {"secretName": "k"}}, "grpc": {"tlsSecretName": "t"}}).serve_config[
        "applications"
    ][0]["args"]
    given = {ALIASES.get(path, path) for path in _leaves(args)}
    from_environment = {"router.admin_key"}
    optional = {"worker.model.path", "worker.model.revision", "worker.model.max_model_len", "router.api_keys"}
    assert given | from_environment | optional >= chart_schema.BY_VALUES


def _leaves(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"replicaCont": 2}, "'replicaCont' not allowed"),
        ({"model": {"tensorParalelSize": 2}}, "'tensorParalelSize' not allowed"),
        ({"models": [{"path": "/m"}, {"path": "/n", "gpu": 1}]}, "/models/1"),
        ({"grafana": {"dashboards": {}}}, "'dashboards' not allowed"),
        ({"model": {"config": {"cach": {}}}}, "'cach' not allowed"),
        ({"model": {"config": {"cache": {"host_byte": 1}}}}, "'host_byte' not allowed"),
        ({"model": {"config": {"cache": {"block_size": 0}}}}, "/model/config/cache/block_size"),
        ({"config": {"router": {"limits": {"max_n": "many"}}}}, "/config/router/limits/max_n"),
        ({"config": {"controller": {"scaling": {"high": 1}}}}, "'high' not allowed"),
        ({"config": {"cluster": {"port": 1}}}, "'cluster' not allowed"),
        ({"config": {"router": {"admin_key": "x"}}}, "'admin_key' not allowed"),
        ({"gpus": "two"}, "/gpus"),
        ({"replicaCount": 0}, "/replicaCount"),
        ({"router": {"replicaCount": 1.5}}, "/router/replicaCount"),
        ({"model": {"device": "tpu"}}, "/model/device"),
        ({"grpc": {"port": 70000}}, "/grpc/port"),
        ({"podMonitor": {"enabled": "yes"}}, "/podMonitor/enabled"),
        ({"resources": {"limits": {"memory": "4 GB"}}}, "/resources/limits/memory"),
        ({"persistence": {"accessModes": ["Shared"]}}, "/persistence/accessModes/0"),
    ],
)
def test_the_schema_refuses(values: dict[str, Any], says: str) -> None:
    assert says in refused(values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (merged(CUDA, {"gpus": 3}), "gpus: pods with 3 GPUs cannot hold workers of tensorParallelSize = 2"),
        (merged(CUDA, {"gpus": 1}), "gpus: pods with 1 GPUs"),
        (
            {
                "models": [
                    {"path": "/a"},
                    {"path": "/b", "device": "cuda", "tensorParallelSize": 4, "gpus": 6},
                ]
            },
            "models[1].gpus: pods with 6 GPUs cannot hold workers of tensorParallelSize = 4",
        ),
        (
            merged(CUDA, {"groups": [{"name": "h", "gpus": 2}, {"name": "a", "gpus": 5}]}),
            "groups[1].gpus: pods with 5 GPUs",
        ),
        ({"gpus": 1}, "gpus: 1, but device is cpu"),
        ({"resources": {"limits": {"nvidia.com/gpu": 1}}}, "resources.limits: nvidia.com/gpu is set by gpus"),
        ({"model": {"path": "org/name"}}, "model.revision: give the commit of org/name"),
        ({"models": [{"path": "/a"}, {"path": "o/n"}]}, "models[1].revision: give the commit of o/n"),
        ({"model": {"path": "o/n", "revision": "main"}}, "model.revision: main is no commit"),
        ({"model": {"path": "o/n", "revision": "b968826"}}, "model.revision: b968826 is no commit"),
        ({"models": [{"path": "/a"}, {"device": "cpu"}]}, "models[1].path: required"),
        ({"models": [{"path": "/a"}, {"path": "/b/a"}]}, "models[1].name: a is there twice"),
        ({"models": [{"path": "/a"}, {"path": "/router"}]}, "no model can be called router"),
        (
            merged(CUDA, {"groups": [{"gpuType": "H"}, {"gpuType": "h"}]}),
            "groups[1].name: two worker groups would be called llama-h",
        ),
        ({"model": {"path": "simulated:", "tensorParallelSize": 2}}, "model.path: a simulated model"),
        (
            {"replicaCount": 5, "autoscaling": {"enabled": True, "maxReplicas": 4}},
            "replicaCount: 5 is not between autoscaling.minReplicas = 1 and autoscaling.maxReplicas = 4",
        ),
        ({"terminationGracePeriodSeconds": 60}, "terminationGracePeriodSeconds: 60 is too short"),
        ({"grpc": {"port": 8000}}, "grpc.port: 8000 is the port of HTTP"),
        ({"persistence": {"hostPath": "/a", "existingClaim": "b"}}, "persistence.hostPath"),
        ({"ingress": {"enabled": True, "tlsSecretName": "t"}}, "ingress.host: required"),
    ],
)
def test_a_template_refuses_and_names_the_value(values: dict[str, Any], says: str) -> None:
    assert says in refused(values)


def test_what_is_just_possible_is_taken() -> None:
    render(merged(CUDA, {"gpus": 4}))
    render({"terminationGracePeriodSeconds": 105})
    render({"model": {"path": "org/name", "revision": "0123456789abcdef" * 2 + "01234567"}})


def test_the_examples_give_no_value_that_is_the_default_already() -> None:
    """An example shows what differs."""
    for name, values in VALUES.items():
        same = [key for key, value in values.items() if DEFAULTS[key] == value]
        assert same == [], name
