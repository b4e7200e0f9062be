"""Files stay small, and the project's text speaks of no machine."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from support.layers import TOP
from support.tree import ROOT, project_files

MAX_LINES = 300
MAX_TEST_LINES = 500  # cases beside each other, not ideas
# file -> why it may be longer.
LONGER: dict[str, str] = {"router/rpc/open_inference_pb2_grpc.py": "generated"}

# Folders of one machine, and addresses of one network.
MACHINE = re.compile(
    r"(?<![\w.:/])/(?:work|root|home|opt|mnt|Users)/\w"
    r"|\b(?:10\.\d{1,3}|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d{1,3}\.\d{1,3}\b"
    r"|index-url[ =]+\S+://"
)


def too_long(files: Iterable[Path], root: Path) -> list[str]:
    """Python files above the limit, those of LONGER left out."""
    found = []
    for path in files:
        name, count = str(path.relative_to(root)), len(path.read_text().splitlines())
        limit = MAX_TEST_LINES if path.name.startswith("test_") else MAX_LINES
        if count > limit and name not in LONGER:
            found.append(f"{name}: {count}")
    return found


def machine_mentions(files: Iterable[Path], root: Path) -> list[str]:
    """Lines that name a place on one machine or network."""
    return [
        f"{path.relative_to(root)}:{number}: {match.group()}"
        for path in files
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if (match := MACHINE.search(line))
    ]


def python_files() -> list[Path]:
    return [path for path in project_files() if path.suffix == ".py"]


def text_files() -> list[Path]:
    binary = {".safetensors", ".png", ".ico", ".gz"}
    skipped = {"tokenizer.json", Path(__file__).name}
    return [path for path in project_files() if path.suffix not in binary and path.name not in skipped]


def test_no_file_grows_beyond_one_idea() -> None:
    assert too_long(python_files(), ROOT) == []


def test_every_exception_is_needed_and_explained() -> None:
    for name, why in LONGER.items():
        assert why
        assert len((ROOT / name).read_text().splitlines()) > MAX_LINES


def test_no_machine_is_mentioned() -> None:
    assert machine_mentions(text_files(), ROOT) == []


def test_every_module_says_what_it_is() -> None:
    bare = [
        path
        for path in python_files()
        if path.relative_to(ROOT).parts[0] in TOP and not opens_with_docstring(path)
    ]
    assert bare == []


def opens_with_docstring(path: Path) -> bool:
    text = path.read_text()
    return text.startswith(('"""', 'r"""')) or text.startswith("#!")


def test_a_long_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n" * (MAX_LINES + 1))
    (tmp_path / "b.py").write_text("x = 1\n" * MAX_LINES)
    (tmp_path / "test_a.py").write_text("x = 1\n" * MAX_TEST_LINES)
    (tmp_path / "test_b.py").write_text("x = 1\n" * (MAX_TEST_LINES + 1))
    found = too_long(sorted(tmp_path.iterdir()), tmp_path)
    assert found == [f"a.py: {MAX_LINES + 1}", f"test_b.py: {MAX_TEST_LINES + 1}"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("see /home/someone/notes", True),
        ("cd /root/x", True),
        ("server at 10.1.2.3", True),
        ("pip install --index-url https://example.org", True),
        ("http://127.0.0.1:8000/work/item", False),
        ("ray 2.60.0 and 10.5 ms", False),
        ("GET /v1/models", False),
    ],
)
def test_a_machine_is_found(tmp_path: Path, line: str, found: bool) -> None:
    (tmp_path / "a.md").write_text(line)
    assert bool(machine_mentions([tmp_path / "a.md"], tmp_path)) is found
