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
        r"^### `(GET|POST) (\S+)`\n(?:[^`#\n][^\n]*\n)*```sh\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE
    )
}
HERE = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> Document:
    found: Document = client.get("/openapi.json").json()
    return found


def heading(path: str) -> str:
    """The page's files are one endpoint to a reader."""
    return "/page/{file}" if path.startswith("/page/") else path


def test_every_endpoint_has_an_example(document: Document) -> None:
    paths: dict[str, Any] = document["paths"]
    assert {(method, heading(path)) for path, ways in paths.items() for method in ways} == set(EXAMPLES)


def test_every_heading_is_read() -> None:
    assert len(EXAMPLES) == TEXT.count("\n### `GET ") + TEXT.count("\n### `POST ")


@pytest.mark.needs_tool("curl")
@pytest.mark.parametrize(("method", "path"), EXAMPLES)
def test_an_example_runs(server: RouterServer, document: Document, method: str, path: str) -> None:
    """The last of its calls is the endpoint's; those before it make what it asks for."""
    command = EXAMPLES[method, path].replace(HERE, server.url)
    assert command != EXAMPLES[method, path]
    before, _, last = command.rpartition("curl -s")
    told = f"set -e\n{before.replace('curl -s', 'curl --fail -o /dev/null -s')}"
    told += "curl -w '\\n%{http_code} %{content_type} %{url}' -s" + last
    done = subprocess.run(["bash", "-c", told], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    body, _, end = done.stdout.rpartition("\n")
    status, kind, url = end.split()[0], end.split()[1].partition(";")[0], end.split()[-1]
    assert status == "200", done.stdout
    _, described = operation(document, method, httpx.URL(url).path)
    schema = described["responses"]["200"]["content"][kind]["schema"]
    if kind == "application/json":
        validate(document, schema, json.loads(body))
    elif kind == "text/event-stream":
        check_events(document, schema, body)
    else:
        assert body
