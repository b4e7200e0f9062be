"""Errors that only the HTTP edge knows, and the way from a worker's error to a typed one.

EllmError
├── Unauthorized     401 invalid_api_key
├── Forbidden        403 forbidden
├── TooSlow          408 request_timeout
├── HeadersTooLarge  431 headers_too_large
├── RateLimited      429 rate_limit_exceeded (with retry_after_s)
├── UnknownRoute     404 not_found
├── WrongMethod      405 method_not_allowed
├── TooManyBodies    429 too_many_bodies (with retry_after_s)
├── BodyTooLarge     413 request_too_large
└── SlowReader       429 client_too_slow (a stream that is cut off: nothing can be said any more)
"""

from __future__ import annotations

from ellm.worker.api.errors import EllmError, ModelNotFound

RETRY_AFTER_S = 1.0  # where a worker is full or away and has not said for how long


class Unauthorized(EllmError):
    """A key is needed, or the one given is not known."""

    status = 401
    code = "invalid_api_key"
    kind = "authentication_error"


class Forbidden(EllmError):
    """No key that the server has opens this."""

    status = 403
    code = "forbidden"
    kind = "permission_error"


class RateLimited(EllmError):
    """The API key has used up its rate; it may come again after `retry_after_s`."""

    status = 429
    code = "rate_limit_exceeded"
    kind = "rate_limit_error"


class UnknownRoute(EllmError):
    """No such path."""

    status = 404
    code = "not_found"
    kind = "invalid_request_error"


class UnknownRequest(EllmError):
    """No request of that id is remembered."""

    status = 404
    code = "request_not_found"
    kind = "invalid_request_error"


class WrongMethod(EllmError):
    """The path takes another method."""

    status = 405
    code = "method_not_allowed"
    kind = "invalid_request_error"


class BodyTooLarge(EllmError):
    """The body is beyond the limit; it was not read to its end."""

    status = 413
    code = "request_too_large"
    kind = "invalid_request_error"


class TooSlow(EllmError):
    """The request did not come to its end in time."""

    status = 408
    code = "request_timeout"
    kind = "timeout_error"


class HeadersTooLarge(EllmError):
    """More headers, or longer ones, than a request needs."""

    status = 431
    code = "headers_too_large"
    kind = "invalid_request_error"


class TooManyBodies(EllmError):
    """The bodies that this server is reading fill what it keeps for them."""

    status = 429
    code = "too_many_bodies"
    kind = "rate_limit_error"


class SlowReader(EllmError):
    """The client reads more slowly than its buffer allows."""

    status = 429
    code = "client_too_slow"
    kind = "rate_limit_error"


def unknown_model(name: str) -> ModelNotFound:
    """Also for a model that the caller's key may not use: it does not learn that there is one."""
    shown = name[:64].encode("ascii", "replace").decode()
    return ModelNotFound(f"the model {shown!r} does not exist here", param="model")


def _by_code(root: type[EllmError]) -> dict[str, type[EllmError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_by_code(child))
    return found


def typed_error(error: EllmError | tuple[str, str] | None, retry_after_s: float | None = None) -> EllmError:
    """The error of a worker's (code, message), and when it may be worth another try. One without a known
    code says nothing of its cause."""
    if isinstance(error, EllmError):
        return error
    kinds = _by_code(EllmError)
    if error is None or error[0] not in kinds or error[0] == EllmError.code:
        return EllmError("internal error")
    kind = kinds[error[0]]
    if kind.status in (429, 503):
        return kind(error[1], retry_after_s=RETRY_AFTER_S if retry_after_s is None else retry_after_s)
    return kind(error[1])
