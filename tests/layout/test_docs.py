"""What the documents say is so: links lead somewhere, and the model's loss is the one it was trained to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.tree import ROOT, project_files

LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
LOSS = re.compile(r"<!-- held-out-loss -->(.*?)<!-- /held-out-loss -->")


def broken_links(path: Path) -> list[str]:
    """Relative links of a document that lead nowhere."""
    targets = [target for target in LINK.findall(path.read_text()) if "://" not in target]
    return [target for target in targets if not (path.parent / target).exists()]


def test_every_relative_link_leads_somewhere() -> None:
    documents = [path for path in project_files() if path.suffix == ".md"]
    assert documents
    assert {path.name: broken for path in documents if (broken := broken_links(path))} == {}


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text("[a](a.md) [b](b.md) [c](https://example.org/x) [d](#here)")
    assert broken_links(page) == ["b.md"]


def test_the_readme_states_the_loss_of_the_model_that_ships() -> None:
    training = json.loads((ROOT / "deploy/bundled/pydoc-5m/training.json").read_text())
    assert LOSS.findall((ROOT / "README.md").read_text()) == [f"{training['held_out_loss']:.2f}"]


@pytest.mark.parametrize(
    "name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "docs/architecture.md"]
)
def test_the_documents_are_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 500
