"""What a request asks of its turn: times per token, priority, a paced stream; from its body or its headers.

A field of the body wins over the header of the same meaning, and a header that is not needed is not read.
Durations alone travel to a worker: what is left of the time to the first token shrinks on the way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ellm.worker.api.errors import InvalidRequest

GRACE_TOKENS = 4  # token i is due at t_first + SLO * (i + 4): the definition of attainment
MIN_TTFT_LEFT_S = 0.001  # of a first token that is late already: the sooner the better
PREFIX = b"x-ellm-"


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """Of one request; None: no such promise."""

    tpot_slo_s: float | None = None  # time per output token
    ttft_slo_s: float | None = None  # from arrival to the first token
    priority: int = 0  # lower runs first

    def ttft_left_s(self, waited_s: float, started: bool) -> float | None:
        """What a worker gets of the time to the first token, `waited_s` after the request's arrival. None
        where there is none, or where the first token has come."""
        if self.ttft_slo_s is None or started:
            return None
        return max(MIN_TTFT_LEFT_S, self.ttft_slo_s - max(0.0, waited_s))


NO_PROMISE = ServiceLevel()


def with_headers(body: Any, headers: Iterable[tuple[bytes, bytes]]) -> Any:
    """`body` with what headers (lower-case names) say of fields that it leaves open; changed in place.
    Raises InvalidRequest that names the header."""
    if not isinstance(body, dict):
        return body
    for name, value in headers:
        if not name.startswith(PREFIX) or name not in _HEADERS:
            continue
        field, read = _HEADERS[name]
        if body.get(field) is None:
            body[field] = read(name.decode(), value.decode("latin-1").strip())
    return body


def _number(name: str, text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,32})?", text):
        raise InvalidRequest(f"{name}: a number of milliseconds", param=name)
    return float(text)


def _integer(name: str, text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise InvalidRequest(f"{name}: an integer", param=name)
    return int(text)


def _flag(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise InvalidRequest(f"{name}: true or false", param=name)
    return text.lower() == "true"


_HEADERS: dict[bytes, tuple[str, Callable[[str, str], Any]]] = {
    b"x-ellm-tpot-slo-ms": ("tpot_slo_ms", _number),
    b"x-ellm-ttft-slo-ms": ("ttft_slo_ms", _number),
    b"x-ellm-priority": ("priority", _integer),
    b"x-ellm-stream-pace": ("stream_pace", _flag),
}
HEADER_NAMES = tuple(name.decode() for name in _HEADERS)
