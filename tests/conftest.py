"""Rules for every test: Ray only where the marker `ray` says so, and no missing tool goes unnoticed.

`needs_tool("promtool")` as a marker leaves a test out where that program is not installed,
`needs_module("numba")` where that module is not, `needs_env("NAME")` where that variable is not set,
`needs_platform("linux")` on another, `gpu` where there is no GPU. All are listed by name at the end.
Another skip would go unnoticed, and a layout test forbids it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# One thread per library unless a test says otherwise: the suite shares its cores with what it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests read nothing from a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="ellm-tests-")  # profiles are not the user's
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if importlib.util.find_spec("hypothesis") is not None:  # a machine with a GPU may do without
    from hypothesis import HealthCheck, settings

    # A loaded machine is no failure.
    settings.register_profile("ellm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("ellm")

NOT_RUN = pytest.StashKey[list[tuple[str, str]]]()  # (test, what it needs)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--not-run-file", help="write the tests left out for want of a tool to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_tool(name): needs this program on the PATH")
    config.addinivalue_line("markers", "needs_module(name): needs this module (a top-level name)")
    config.addinivalue_line("markers", "needs_env(name): needs this environment variable")
    config.addinivalue_line("markers", "needs_platform(name): needs this sys.platform")
    config.stash[NOT_RUN] = []


@pytest.hookimpl(trylast=True)  # what -m and -k leave out is not missing
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for tool in _missing(item):
            config.stash[NOT_RUN].append((item.nodeid, tool))
            item.add_marker(pytest.mark.skip(reason=f"needs {tool}"))


def _missing(item: pytest.Item) -> Iterator[str]:
    for marker in item.iter_markers("needs_tool"):
        name = marker.args[0]
        if shutil.which(name) is None and not Path(sys.executable).with_name(name).exists():
            yield name
    for marker in item.iter_markers("needs_module"):
        yield from _missing_module(marker.args[0])
    for marker in item.iter_markers("needs_env"):
        if not os.environ.get(marker.args[0]):
            yield f"${marker.args[0]}"
    for marker in item.iter_markers("needs_platform"):
        if not sys.platform.startswith(marker.args[0]):
            yield marker.args[0]
    if item.get_closest_marker("gpu") and not any(Path("/dev").glob("nvidia[0-9]*")):
        yield "a GPU"


def _missing_module(name: str) -> Iterator[str]:
    if importlib.util.find_spec(name) is None:
        yield name
    elif name == "numba":  # installed, and still of no use to the kernels on an old CPU
        from ellm.kernels.dispatch import has_numba

        if not has_numba():
            yield "a CPU with FMA and F16C"


def _folded(not_run: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The cases of one test as one line, in the order of collection."""
    cases: dict[tuple[str, str], list[str]] = {}
    for test, need in not_run:
        cases.setdefault((test.partition("[")[0], need), []).append(test)
    return [
        (names[0] if len(names) == 1 else f"{test} ({len(names)} cases)", need)
        for (test, need), names in cases.items()
    ]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    not_run = _folded(config.stash[NOT_RUN])
    if not_run:
        terminalreporter.section("not run on this machine")
        for test, tool in not_run:
            terminalreporter.line(f"{test}: needs {tool}")
    path = config.getoption("--not-run-file")
    if path:
        Path(path).write_text(json.dumps(not_run))


@pytest.fixture(autouse=True)
def _ray_only_by_marker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test without the marker `ray` may not start or join a cluster."""
    if request.node.get_closest_marker("ray"):
        yield
        return

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("ray.init in a test without the marker `ray`")

    if "ray" in sys.modules:
        monkeypatch.setattr(sys.modules["ray"], "init", forbidden)
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
        raise AssertionError("this test started Ray without the marker `ray`")
