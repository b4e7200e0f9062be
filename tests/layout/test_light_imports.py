"""What must be importable at once, or on a machine without torch or Ray, is."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.layers import PURE, modules
from support.tree import ROOT

HEAVY = ("torch", "transformers", "ray", "numpy")


def loaded_by(code: str, watched: tuple[str, ...]) -> list[str]:
    """Which of the watched packages a fresh interpreter has loaded after running `code`."""
    program = f"{code}\nimport sys; print(*[name for name in {watched!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split("\n")[-2].split()


def imports_of(prefixes: tuple[str, ...]) -> str:
    names = [
        name
        for name, _ in modules(ROOT)
        if name.startswith(prefixes) and not name.endswith((".driver", ".actor"))
    ]
    assert names
    return "\n".join(f"import ellm.{name}" for name in names)


def test_the_brains_load_nothing_heavy() -> None:
    assert loaded_by(imports_of(PURE), HEAVY) == []


def test_the_routers_edge_is_free_of_torch() -> None:
    assert loaded_by(imports_of(("router.app", "router.config", "router.openai")), ("torch",)) == []


def test_the_command_line_loads_nothing_heavy() -> None:
    assert (
        loaded_by(imports_of(("deploy.cli", "deploy.commands", "deploy.config", "deploy.resolve")), HEAVY)
        == []
    )


def test_checking_a_checkpoint_is_free_of_torch() -> None:
    assert loaded_by("import ellm.worker.model.inspect", HEAVY) == []


def test_the_check_catches_an_import() -> None:
    assert loaded_by("import numpy", HEAVY) == ["numpy"]


@pytest.mark.parametrize("words", [["--help"], ["version"]])
def test_the_command_answers_without_what_is_slow_to_import(words: list[str]) -> None:
    run = f"from ellm.deploy.cli import main\ntry: main({words!r})\nexcept SystemExit: pass"
    assert loaded_by(run, (*HEAVY, "fastapi")) == []
