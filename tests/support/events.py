"""Reads a stream of server-sent events strictly: what a lenient client forgives is an error here."""

from __future__ import annotations

import json
from typing import Any

import httpx


def read_events(response: httpx.Response) -> list[dict[str, Any]]:
    """All events before [DONE]. Asserts the form: type, `data: ` alone, LF, one [DONE] at the very end."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    raw = response.content
    assert b"\r" not in raw
    assert raw.endswith(b"data: [DONE]\n\n")
    blocks = raw.decode().split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks.pop() == "data: [DONE]"
    assert "data: [DONE]" not in blocks
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def stream(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = client.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    return read_events(response)


def deltas(events: list[dict[str, Any]], index: int = 0) -> str:
    """The text of one choice."""
    return "".join(
        choice["text"] if "text" in choice else choice["delta"].get("content", "")
        for event in events
        for choice in event["choices"]
        if choice["index"] == index
    )
