"""A test that cannot run here is listed by name; none is left out in silence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from support.tree import ROOT, project_files

SILENT = re.compile(r"\b(?:importorskip|skipif)\b|\bpytest\.(?:mark\.)?skip\b|\bif (?:not )?has_numba\(")
KERNEL_TESTS = ROOT / "tests" / "unit" / "kernels"


def test_every_skip_is_a_listed_one() -> None:
    allowed = {ROOT / "tests" / "conftest.py", Path(__file__)}
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in project_files()
        if path.suffix == ".py" and path.is_relative_to(ROOT / "tests") and path not in allowed
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if SILENT.search(line)
    ]
    assert found == []


def test_without_numba_its_tests_are_listed_and_the_others_run(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['numba'] = None\n")  # not to be had
    listed = tmp_path / "not_run.json"
    pytest = str(Path(sys.executable).with_name("pytest"))
    files = [str(KERNEL_TESTS / name) for name in ("test_noise.py", "test_jit_launch.py")]
    done = subprocess.run(
        [pytest, "-q", *files, f"--not-run-file={listed}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[1-9]\d* passed", done.stdout)
    not_run = json.loads(listed.read_text())
    folder = KERNEL_TESTS.relative_to(ROOT)
    assert [f"{folder}/test_noise.py::test_jit_words_are_the_documented_ones", "numba"] in not_run
    assert [f"{folder}/test_jit_launch.py::test_every_unit_runs_once (3 cases)", "numba"] in not_run
    for test, need in not_run:
        assert f"{test}: needs {need}" in done.stdout
