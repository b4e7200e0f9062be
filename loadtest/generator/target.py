"""Who is tested: a URL taken apart. Plain data, sent to every process of the generator."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ellm.loadtest.generator.content import Scale
from ellm.loadtest.generator.options import Endpoint, Options
from ellm.worker.api.errors import ConfigError, EllmError

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions", "grpc": ""}
SCHEMES = {"http": (False, 80), "https": (True, 443), "grpc": (False, 8001), "grpcs": (True, 443)}


class TargetFailed(EllmError):
    """The server cannot be reached, or does not want what it is asked for."""


@dataclass(frozen=True, slots=True)
class Target:
    """One server, resolved and checked."""

    url: str  # scheme://host:port and what stands before /v1
    endpoint: Endpoint
    tls: bool
    host: str
    address: str  # resolved
    port: int
    path: str
    model: str
    headers: dict[str, str] = field(default_factory=dict)
    scale: Scale = field(default_factory=Scale)
    words: tuple[str, ...] = ()  # of prompts; empty: content.WORDS
    server: str = ""  # what it says it is
    ours: bool = False  # has /admin/workers open to us

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_target(options: Options) -> Target:
    """The URL's parts, its name resolved. Raises ConfigError or TargetFailed."""
    url = options.url if "://" in options.url else f"http://{options.url}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"--url {options.url}: {error}") from None
    if parts.scheme not in SCHEMES or not parts.hostname:
        raise ConfigError(f"--url {options.url}: expected http://, https://, grpc:// or grpcs://HOST:PORT")
    tls, default_port = SCHEMES[parts.scheme]
    endpoint = options.endpoint()
    base = parts.path.rstrip("/")
    for ending in ("/chat/completions", "/completions", "/v1"):
        base = base.removesuffix(ending)
    headers = dict(options.headers)
    if options.api_key:
        headers["Authorization"] = f"Bearer {options.api_key}"
    port = port or default_port
    return Target(
        url=f"{parts.scheme}://{parts.netloc}{base}",
        endpoint=endpoint,
        tls=tls,
        host=parts.hostname,
        address=_resolve(parts.hostname, port),
        port=port,
        path=base + PATHS[endpoint],
        model=options.model or "",
        headers=headers,
    )


def _resolve(host: str, port: int) -> str:
    """Once, so that no request waits for a name server."""
    try:
        ipaddress.ip_address(host)
        return host
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise TargetFailed(f"there is no host {host!r}: {error.strerror or error}") from None
    # A server on this machine mostly listens on IPv4 alone.
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(found[0][4][0])


def request_body(
    target: Target, options: Options, messages: list[dict[str, str]], max_tokens: int
) -> dict[str, Any]:
    """OpenAI's fields for one chat, or for a completion of all messages' text."""
    body: dict[str, Any] = {"model": target.model, "max_tokens": max_tokens, "stream": True}
    if target.endpoint == "chat":
        body["messages"] = messages
    else:
        body["prompt"] = "".join(message["content"] for message in messages)
    body["stream_options"] = {"include_usage": True}
    body["temperature"] = 0
    if options.ignore_eos:
        body["ignore_eos"] = True
    return body | options.extra_body
