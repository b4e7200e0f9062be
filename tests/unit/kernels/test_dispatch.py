"""Which body is chosen, what is refused, and what is said when STRICT cannot be had."""

from __future__ import annotations

import importlib.util
import logging
import platform
import subprocess
import sys

import pytest

from ellm.kernels import dispatch
from ellm.kernels.dispatch import select


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.needs_module("numba")
def test_the_jit_is_the_cpus_default_where_numba_is() -> None:
    for settings in ({}, {"jit": True}, {"deterministic": True}, {"jit": True, "deterministic": True}):
        ops = select("cpu", **settings)
        assert (ops.name, ops.deterministic) == ("numba", True)


def test_torch_where_the_jit_is_refused_or_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    for device, settings in (("cpu", {"jit": False}), ("cuda", {}), ("cuda:1", {"jit": False})):
        ops = select(device, **settings)
        assert (ops.name, ops.deterministic) == ("torch", False)
    assert not caplog.records


def test_what_cannot_be_had_is_refused(without_numba: None) -> None:
    with pytest.raises(ValueError, match="numba is not installed"):
        select("cpu", jit=True)
    with pytest.raises(ValueError, match="run on a CPU"):
        select("cuda", jit=True)
    for device in ("cpu", "cuda"):
        with pytest.raises(ValueError, match="deterministic=True"):
            select(device, deterministic=True)


def test_a_missing_jit_is_said_in_one_line(without_numba: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert select("cpu").name == "torch"
    (message,) = (r.getMessage() for r in caplog.records)
    assert "numba is not installed" in message
    assert "no STRICT" in message
    assert "\n" not in message
    caplog.clear()
    assert select("cpu", deterministic=False).name == "torch"
    assert not caplog.records


@pytest.mark.needs_module("numba")
def test_an_old_cpu_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from llvmlite import binding

    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: {"sse2": True})
    assert not dispatch.has_numba()
    with pytest.raises(ValueError, match="no FMA"):
        select("cpu", jit=True)
    assert select("cpu", deterministic=False).name == "torch"


def test_the_torch_body_needs_no_numba() -> None:
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "from ellm.kernels.dispatch import select\n"
        "print(select('cpu', jit=False).name, 'llvmlite' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torch", "False"]
