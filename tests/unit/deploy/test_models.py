"""Several models in one configuration, and the one-model form beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ellm.deploy import config, dump, resolve
from ellm.deploy.app import build_application
from ellm.deploy.server import needed_cpus
from ellm.deploy.tree import worker_deployment
from ellm.worker.api.errors import ConfigError

TWO = """
worker: {scheduler: {max_num_seqs: 32}}
block_size: 8
models:
- {model: "simulated:overhead_s=0.01", served_model_name: fast, workers: 2, max_workers: 4}
- model: "simulated:overhead_s=0.1"
  served_model_name: slow
  workers: 1
  worker: {scheduler: {max_num_seqs: 4}}
"""


def load(tmp_path: Path, text: str, *settings: str) -> config.EllmConfig:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return config.load(path, {}, settings).config


def test_entries_take_what_stands_above_and_override_it(tmp_path: Path) -> None:
    fast, slow = load(tmp_path, TWO).served
    assert (fast.name, fast.num_workers, fast.min_workers, fast.max_workers) == ("fast", 2, 2, 4)
    assert (slow.name, slow.num_workers, slow.min_workers, slow.max_workers) == ("slow", 1, 1, 1)
    assert (fast.worker.scheduler.max_num_seqs, slow.worker.scheduler.max_num_seqs) == (32, 4)
    assert fast.worker.cache.block_size == slow.worker.cache.block_size == 8


def test_one_model_needs_no_list() -> None:
    tree = config.from_mapping({"model": "simulated:", "workers": 3})
    (only,) = tree.served
    assert (only.name, only.num_workers, only.max_workers) == ("simulated", 3, 3)
    assert worker_deployment(tree, only) == "Worker"


def test_it_is_dumped_and_loads_again(tmp_path: Path) -> None:
    tree = resolve.resolve(load(tmp_path, TWO))
    again = config.from_mapping(yaml.safe_load(dump.dump(tree)))
    assert again.models == tree.models
    assert again.cluster == tree.cluster


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: {a: 1}", "models: expected a list"),
        ("models: [{workers: 2}]", r"models\[0\]: model is required"),
        ("models: [{model: a, port: 1}]", r"models\[0\]: cluster.port is for all models alike"),
        ("models: [{model: a, wrokers: 1}]", r"models\[0\]: unknown key wrokers"),
        ("models: [{model: x/a}, {model: y/a}]", "models: a is there twice"),
        ("model: b\nmodels: [{model: a}]", "give either model or models"),
        ("models: [{model: a, workers: 3, max_workers: 2}]", "a: 3 workers are not between min_workers = 3"),
        ("min_workers: 3\nworkers: 2", "2 workers are not between min_workers = 3 and max_workers = 2"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_each_model_has_a_deployment_and_counts_for_the_cluster(tmp_path: Path) -> None:
    tree = resolve.resolve(load(tmp_path, TWO, "cluster.worker_num_cpus=0.5"))
    assert [worker_deployment(tree, model) for model in tree.served] == ["Worker-fast", "Worker-slow"]
    assert needed_cpus(tree) == 1 + 0.5 * (4 + 1)
    build_application(tree)
