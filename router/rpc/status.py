"""Typed errors as gRPC statuses: a code, a text for a person, and for a program trailing metadata.

`ellm-error-code` is the code that HTTP would send, `ellm-error-param` the field at fault, `retry-after` whole
seconds. An error of the server's own says nothing of its cause.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import grpc

from ellm.worker.api.errors import EllmError

Metadata = tuple[tuple[str, str], ...]
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    503: grpc.StatusCode.UNAVAILABLE,
}
MAX_DETAILS = 512  # characters; longer ones would not fit what peers take as headers


class Aborted(EllmError):
    """Somebody has asked for the end of this generation."""

    status = 499
    code = "aborted"
    kind = "invalid_request_error"


@dataclass(frozen=True, slots=True)
class Status:
    """How a call ends."""

    code: grpc.StatusCode
    details: str
    metadata: Metadata


def status_of(error: EllmError) -> Status:
    code = _CODES.get(error.status)
    if code is None:
        return Status(grpc.StatusCode.INTERNAL, "internal error", (("ellm-error-code", error.code),))
    metadata = [("ellm-error-code", error.code)]
    details = error.message
    if error.param:
        shown = _printable(error.param)
        metadata.append(("ellm-error-param", shown))
        if error.param.partition("[")[0] not in details:
            details = f"{shown}: {details}"
    if error.retry_after_s is not None:
        metadata.append(("retry-after", str(max(1, math.ceil(error.retry_after_s)))))
    return Status(code, details[:MAX_DETAILS], tuple(metadata))


def _printable(text: str) -> str:
    """What a metadata value may hold."""
    return "".join(c if " " <= c <= "~" else "?" for c in text[:128]).strip()
