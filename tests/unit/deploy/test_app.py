"""The builder that a Serve config names."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray import serve

from ellm.deploy.app import build, build_application
from ellm.deploy.config import from_mapping
from ellm.deploy.resolve import resolve
from ellm.worker.api.errors import ConfigError


def test_a_serve_config_s_arguments_become_an_application() -> None:
    assert isinstance(build({"workers": 1, "device": "cpu"}), serve.Application)


def test_a_mistake_in_the_arguments_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown key worker\.cach"):
        build({"worker": {"cach": {}}})
    with pytest.raises(ConfigError, match=r"cluster\.num_workers: expected an integer"):
        build({"workers": "two"})


def test_the_deployments_have_what_the_config_says(tmp_path: Path) -> None:
    config = resolve(from_mapping({"workers": 3, "routers": 2, "device": "cpu", "address": "auto"}))
    application = build_application(config)
    router = application._bound_deployment
    assert router.num_replicas == 2
    (workers,) = router.init_args
    deployment = getattr(workers, "_bound_deployment", workers)
    assert deployment.num_replicas == 3
