"""The Serve config that ships: Ray's schema and our own loader take it, and its environment may say more."""

from __future__ import annotations

import pytest
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema
from support.tree import ROOT

from ellm.deploy import app
from ellm.deploy.config import from_serve_args
from ellm.worker.api.errors import ConfigError

FILE = ROOT / "deploy" / "serve" / "ellm.yaml"


def test_ray_and_our_loader_take_the_file_that_ships() -> None:
    data = yaml.safe_load(FILE.read_text())
    ServeDeploySchema.model_validate(data)
    (application,) = data["applications"]
    assert application["import_path"] == f"{app.__name__}:{app.build.__name__}"
    assert isinstance(app.build(application["args"]), serve.Application)
    assert application["args"]["routers"] > 1  # one alone leaves a gap while it is replaced


def test_what_stands_there_as_a_comment_is_taken_too() -> None:
    text = FILE.read_text()
    for line in ("# tp: 2", "# grpc_port: 9000"):
        text = text.replace(line, line.removeprefix("# "))
    (application,) = yaml.safe_load(text)["applications"]
    config = from_serve_args(application["args"])
    assert (config.worker.tensor_parallel_size, config.cluster.grpc_port) == (2, 9000)


def test_a_key_may_come_from_the_environment_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELLM_ROUTER__ADMIN_KEY", "secret")
    monkeypatch.setenv("ELLM_CLUSTER__NUM_WORKERS", "3")
    monkeypatch.setenv("ELLM_PORT", "tcp://1.2.3.4:80")  # Kubernetes makes such for a service
    config = from_serve_args({"workers": 1, "policy": "full-chunked"})
    assert config.router.admin_key == "secret"
    assert config.cluster.num_workers == 3
    assert config.worker.scheduler.policy == "full-chunked"
    assert config.cluster.address == "auto"
    monkeypatch.setenv("ELLM_ROUTER__ADMIN_KEI", "x")
    with pytest.raises(ConfigError, match=r"environment: unknown key router\.admin_kei"):
        from_serve_args({})
