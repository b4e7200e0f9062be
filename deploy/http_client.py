"""The HTTP that `ellm chat` and `ellm status` need: JSON in and out, and server-sent events.

Standard library only, so that these commands start at once.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping
from http.client import HTTPException, HTTPResponse
from typing import Any

from ellm.worker.api.errors import EllmError

DONE = "[DONE]"


class RequestFailed(EllmError):
    """The server could not be reached, or answered with an error; the message is the server's own."""


class Server:
    """One eLLM server. Every method raises RequestFailed."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        if "://" not in url:
            url = f"http://{url}"
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s

    def get(self, path: str) -> Any:
        """The JSON body of a GET."""
        with self._open(path, None) as response:
            return _json(self.url + path, response.read())

    def text(self, path: str) -> str:
        """The body of a GET as text."""
        with self._open(path, None) as response:
            return response.read().decode(errors="replace")

    def probe(self, path: str) -> None:
        """Returns if a GET is answered with 200."""
        with self._open(path, None):
            return

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any]]:
        """The events of a POST with `stream`, up to [DONE]. Closing the iterator ends the request."""
        with self._open(path, json.dumps({**body, "stream": True}).encode()) as response:
            try:
                for line in response:
                    if not line.startswith(b"data:"):
                        continue
                    text = line.removeprefix(b"data:").strip().decode()
                    if text == DONE:
                        return
                    event = _json(self.url + path, text.encode())
                    if "error" in event:
                        raise RequestFailed(event["error"].get("message", "the server reported an error"))
                    yield event
            except (OSError, HTTPException) as error:
                raise RequestFailed(f"the stream from {self.url} broke off: {error}") from None
        raise RequestFailed(f"the stream from {self.url} ended before it was done")

    def _open(self, path: str, body: bytes | None) -> HTTPResponse:
        headers = {**self._headers, "Content-Type": "application/json"}
        try:
            request = urllib.request.Request(self.url + path, data=body, headers=headers)
            response: HTTPResponse = urllib.request.urlopen(request, timeout=self._timeout_s)
            return response
        except urllib.error.HTTPError as error:
            raise RequestFailed(_error_message(error.code, error.read())) from None
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise RequestFailed(f"cannot reach {self.url}: {reason}") from None


def _json(url: str, body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        raise RequestFailed(f"{url} did not answer with JSON; is it an eLLM server?") from None


def _error_message(status: int, body: bytes) -> str:
    try:
        return f"{json.loads(body)['error']['message']} (HTTP {status})"
    except (ValueError, KeyError, TypeError):
        return f"the server answered HTTP {status}"
