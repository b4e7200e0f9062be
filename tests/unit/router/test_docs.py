"""Every endpoint has an example in docs/api.md, and it runs as it stands but for the address."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import httpx
import pytest
from support.described import Document, check_events, operation, validate
from support.router_server import RouterServer
from support.tree import ROOT

TEXT = (ROOT / "docs" / "api.md").read_text()
EXAMPLES = {
    (method.lower(), path): command
    for method, path, command in re.findall(
        r"^### `(GET|POST) (\S+)`\n(?:[^`#]*\n)?```sh\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE
    )
}
HERE = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> Document:
    found: Document = client.get("/openapi.json").json()
    return found


def test_every_endpoint_has_an_example(document: Document) -> None:
    paths: dict[str, Any] = document["paths"]
    called = {(m, path) for path, ways in paths.items() for m, way in ways.items() if way["tags"] != ["page"]}
    drawn = {(m, path) for path, ways in paths.items() for m in ways} - called  # what the page asks for
    assert called <= set(EXAMPLES) <= called | drawn


@pytest.mark.needs_tool("curl")
@pytest.mark.parametrize(("method", "path"), EXAMPLES)
def test_an_example_runs(server: RouterServer, document: Document, method: str, path: str) -> None:
    command = EXAMPLES[method, path].replace(HERE, server.url)
    assert command != EXAMPLES[method, path]
    told = command.replace("curl -s", "curl -w '\\n%{http_code} %{content_type}' -s", 1)
    done = subprocess.run(["bash", "-c", told], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    body, _, last = done.stdout.rpartition("\n")
    status, kind = last.partition(";")[0].split(" ", 1)
    assert status == "200", done.stdout
    _, described = operation(document, method, path.format(model_id="x"))
    schema = described["responses"]["200"]["content"][kind]["schema"]
    if kind == "application/json":
        validate(document, schema, json.loads(body))
    elif kind == "text/event-stream":
        check_events(document, schema, body)
    else:
        assert body
