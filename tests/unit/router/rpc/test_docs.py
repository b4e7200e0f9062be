"""The clients that docs/grpc.md shows run as they stand, but for the port."""

from __future__ import annotations

import re

import pytest
from support.router_server import RouterServer
from support.tree import ROOT

TEXT = (ROOT / "docs" / "grpc.md").read_text()
EXPECTED = ("The list method append\n[stop, ", "text_output [b'The list method append', b'A dictionary is']")
EXAMPLES = re.findall(r"<!-- runs in the tests -->\n```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_examples_are_found() -> None:
    assert len(EXAMPLES) == TEXT.count("```python") == 2


@pytest.mark.parametrize("index", range(2))
def test_an_example_runs(rpc_server: RouterServer, capsys: pytest.CaptureFixture[str], index: int) -> None:
    assert "127.0.0.1:8001" in EXAMPLES[index]
    exec(EXAMPLES[index].replace(":8001", f":{rpc_server.rpc.port}"), {})
    said = capsys.readouterr().out
    expected = [
        "The list method append\n[stop, ",
        "text_output [b'The list method append', b'A dictionary is']",
    ]
    assert expected[index] in said


def test_every_method_and_setting_it_names_is_there() -> None:
    from ellm.deploy.tree import TYPES
    from ellm.loadtest.rpc_messages import METHODS

    assert [method for method in METHODS if f"`{method.rpartition('/')[2]}`" not in TEXT] == []
    named = set(re.findall(r"`(?:--set )?((?:cluster|router)\.[a-z_.]+)", TEXT))
    assert named
    assert named <= set(TYPES)
