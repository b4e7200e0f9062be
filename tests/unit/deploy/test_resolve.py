"""What "auto" becomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ellm.deploy import config, resolve, tree
from ellm.worker.api.errors import ConfigError


def made(*settings: str) -> tree.EllmConfig:
    return resolve.resolve(config.load(environ={}, settings=settings).config)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "this_device", lambda: "cpu")


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(("cores", "workers", "threads"), [(2, 2, 1), (8, 2, 4), (1, 2, 1), (7, 3, 2)])
def test_workers_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: int, threads: int
) -> None:
    monkeypatch.setattr(resolve, "num_cores", lambda: cores)
    assert made(f"workers={workers}").worker.num_threads == threads
    assert made(f"workers={workers}", "threads=5").worker.num_threads == 5
    assert made(f"workers={workers}", "address=auto").worker.num_threads is None


@pytest.mark.usefixtures("without_gpu")
def test_a_cpu_is_strict_unless_told_otherwise() -> None:
    assert made().worker.model.deterministic is True
    assert made("worker.model.deterministic=false").worker.model.deterministic is False
    assert made("worker.model.jit=false").worker.model.deterministic is None


def test_a_gpu_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "this_device", lambda: "cuda")
    assert made().worker.model.device == "cuda"
    assert made().worker.model.deterministic is False
    assert made().worker.num_threads is None
    assert made("device=cpu").worker.model.device == "cpu"


@pytest.mark.usefixtures("without_gpu")
def test_a_missing_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="no NVIDIA GPU"):
        made("device=cuda")
    assert made("device=cuda", "address=auto").worker.model.device == "cuda"


def test_a_folder_is_found_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama").mkdir()
    monkeypatch.chdir(tmp_path)
    model = made("model=llama").worker.model
    assert (model.path, model.name) == (str(tmp_path / "llama"), "llama")
    hub = made("model=someone/llama-7b").worker.model
    assert (hub.path, hub.name) == ("someone/llama-7b", "llama-7b")


def test_cores_are_counted() -> None:
    assert resolve.num_cores() >= 1
