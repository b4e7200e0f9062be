"""The layers hold in the tree, and the walk that says so catches each kind of breach."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.layers import modules, violations

ROOT = Path(__file__).parents[2]


def test_the_tree_keeps_its_layers() -> None:
    assert len(list(modules(ROOT))) > 30
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "why"),
    [
        ("kernels/a.py", "import ellm.worker.api.errors", "kernels may not"),
        ("worker/loop.py", "from ellm.router import config", "worker may not"),
        ("cluster/api/view.py", "from ellm.worker.cache.block_pool import BlockPool", "cluster may not"),
        ("cluster/driver.py", "from ellm.worker.actor import Rank", "cluster may not"),
        ("router/app.py", "def f():\n    from ellm.worker.loop import EngineLoop", "router may not"),
        ("loadtest/run.py", "import ellm.deploy.config", "loadtest may not"),
        ("worker/api/a.py", "from ellm.worker.cache.block_pool import BlockPool", "upwards"),
        ("worker/engine/core.py", "from ..executor.base import Executor", "a brain imports a body"),
        ("worker/executor/local.py", "from ellm.worker import loop", "upwards"),
        ("worker/engine/core.py", "import torch", "standard library only"),
        ("worker/cache/pool.py", "def f():\n    import numpy.random", "standard library only"),
        ("worker/engine/core.py", "import time", "no clock"),
        ("router/policies/p.py", "import asyncio", "no clock"),
        ("router/policies/p.py", "from ellm.router.app import app", "a brain imports a body"),
        ("cluster/controller.py", "from ellm.cluster import driver", "a brain imports a body"),
        ("cluster/controller.py", "import ray", "standard library only"),
        ("worker/loop.py", "import worker.api.errors", "second copy"),
        ("deploy/app.py", "from kernels import ops", "second copy"),
        ("worker/loop.py", "import importlib\nimportlib.import_module('ellm.deploy.cli')", "worker may not"),
        ("worker/api/__init__.py", "from . import cost_model\nfrom ..engine import plan", "upwards"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, file: str, source: str, why: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    found = violations(tmp_path)
    assert len(found) == 1
    assert why in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("worker/executor/local.py", "import torch\nfrom ellm.worker.engine.plan import BatchPlan"),
        ("worker/loop.py", "import time, threading\nfrom ellm.worker.executor import base"),
        ("router/app.py", "from ellm.cluster.api.view import View\nfrom ellm.worker.api import wire"),
        ("cluster/actor.py", "import ray\nfrom ellm.cluster.controller import Controller"),
        ("deploy/app.py", "from ellm.router.deployment import Router\nimport ellm.kernels.ops"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path) == []
