"""Running kernels: each unit once whoever runs it, without OpenMP too, and without a folder for the cache."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.needs_module("numba")


@pytest.fixture
def jit_launch() -> ModuleType:
    from ellm.kernels import jit_launch

    return jit_launch


def run(units: int) -> tuple[list[int], list[int]]:
    from support.counting_kernel import COUNT

    done, by_thread = np.zeros(units, dtype=np.int64), np.zeros(8, dtype=np.int64)
    COUNT(0, units, (units, done.ctypes.data, by_thread.ctypes.data))
    return done.tolist(), by_thread.tolist()


def test_every_unit_runs_once(threads: int) -> None:
    for units in (0, 1, 2, 5, 20000):
        done, by_thread = run(units)
        assert done == [1] * units
        assert sum(by_thread) == units
        assert not any(by_thread[threads if units > 1 else 1 :])


def test_kernels_of_several_threads_do_not_mix(threads: int) -> None:
    results: list[list[int]] = []

    def work() -> None:
        torch.set_num_threads(threads)
        results.extend(run(1000)[0] for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [[1] * 1000] * 60


def test_torchs_own_pool_is_found(jit_launch: ModuleType) -> None:
    assert jit_launch.gomp_parallel() is not None


def test_one_thread_where_there_is_no_openmp(
    jit_launch: ModuleType, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(jit_launch, "gomp_parallel", lambda: None)
    done, by_thread = run(100)
    assert done == [1] * 100
    assert by_thread[0] == 100


def test_kinds_are_compiled_apart() -> None:
    from support.counting_kernel import COUNT

    done, by_thread = np.zeros(3, dtype=np.int64), np.zeros(8, dtype=np.int64)
    COUNT(2, 3, (3, done.ctypes.data, by_thread.ctypes.data))
    assert done.tolist() == [3, 3, 3]


def test_without_a_folder_to_cache_in(jit_launch: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    scope: dict[str, Any] = {}
    exec("def nothing(block):\n    pass", scope)  # numba finds no file beside which to keep it
    with caplog.at_level("INFO"):
        function = jit_launch._compile_cached(scope["nothing"])
    assert function.address
    assert "NUMBA_CACHE_DIR" in caplog.text
