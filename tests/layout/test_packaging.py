"""What is installed is what is in the tree: the package list, and the contents of a wheel built from it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from support.layers import TOP
from support.tree import ROOT, project_files


def package_problems(root: Path, listed: list[str]) -> list[str]:
    """Differences between pyproject's list and the tree; an __init__.py too many or too few."""
    problems = []
    found = {f"ellm.{top}" for top in TOP}
    for top in TOP:
        if (root / top / "__init__.py").exists():
            problems.append(f"{top}/__init__.py would make a package of a namespace folder")
        for path in sorted((root / top).rglob("*.py")):
            folder = path.parent.relative_to(root)
            if len(folder.parts) > 1:
                found.add("ellm." + ".".join(folder.parts))
                if not (root / folder / "__init__.py").exists():
                    problems.append(f"{folder} has no __init__.py")
    problems += [f"{name} is not listed in pyproject.toml" for name in sorted(found - set(listed))]
    problems += [f"{name} is listed, but not in the tree" for name in sorted(set(listed) - found)]
    return list(dict.fromkeys(problems))


def listed_packages(root: Path) -> list[str]:
    data = tomllib.loads((root / "pyproject.toml").read_text())
    packages: list[str] = data["tool"]["setuptools"]["packages"]
    return packages


def test_pyproject_lists_every_package() -> None:
    assert package_problems(ROOT, listed_packages(ROOT)) == []


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("worker/__init__.py", "would make a package"),
        ("worker/newer/__init__.py", "is not listed"),
        ("worker/api/deep/x.py", "has no __init__.py"),
    ],
)
def test_a_wrong_package_is_found(tmp_path: Path, file: str, problem: str) -> None:
    for top in TOP:
        (tmp_path / top).mkdir()
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('"""x"""')
    assert any(problem in line for line in package_problems(tmp_path, [f"ellm.{top}" for top in TOP]))
    assert package_problems(tmp_path, [*(f"ellm.{top}" for top in TOP), "ellm.gone"])[-1].startswith(
        "ellm.gone"
    )


def tree_names() -> list[str]:
    return [str(path.relative_to(ROOT)) for path in project_files()]


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in a wheel that is built from a copy of the tree."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in tree_names():
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    build = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_the_wheel_holds_every_module(wheel_files: list[str]) -> None:
    wanted = {f"ellm/{name}" for name in tree_names() if name.endswith(".py") and name.split("/")[0] in TOP}
    assert {name for name in wheel_files if name.endswith(".py")} == wanted


def test_the_wheel_holds_the_model_and_the_license(wheel_files: list[str]) -> None:
    model = {f"ellm/{name}" for name in tree_names() if name.startswith("deploy/bundled/pydoc-5m/")}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {
        name.rpartition("/")[2] for name in model
    }
    assert model <= set(wheel_files)
    assert any(name.endswith("licenses/LICENSE") for name in wheel_files)
    assert any(name.endswith("entry_points.txt") for name in wheel_files)


def test_the_wheel_holds_the_protos_and_their_types(wheel_files: list[str]) -> None:
    wanted = {f"ellm/{name}" for name in tree_names() if name.endswith((".proto", ".pyi"))}
    assert len(wanted) == 4
    assert wanted <= set(wheel_files)


def test_the_wheel_holds_the_page(wheel_files: list[str]) -> None:
    wanted = {f"ellm/{name}" for name in tree_names() if name.startswith("router/page/")}
    assert "ellm/router/page/index.html" in wanted
    assert wanted <= set(wheel_files)


def test_the_wheel_holds_nothing_else(wheel_files: list[str]) -> None:
    strange = [
        name
        for name in wheel_files
        if not name.endswith(".py")
        and ".dist-info/" not in name
        and not name.startswith("ellm/deploy/bundled/pydoc-5m/")
        and not name.startswith("ellm/router/page/")
        and not (name.startswith("ellm/router/rpc/") and name.endswith((".proto", ".pyi")))
    ]
    assert strange == []
    assert not any(name.startswith(("tests/", "ellm/tests/")) or "/test_" in name for name in wheel_files)
