"""The error tree that callers see.

    EllmError                 500 internal_error
    ├── InvalidRequest        400 invalid_request_error (names the field in `param`)
    │   └── PromptTooLong     400 context_length_exceeded
    ├── ModelNotFound         404 model_not_found
    ├── QueueFull             429 queue_full (with retry_after_s)
    ├── DeadlineExceeded      408 deadline_exceeded
    ├── Unavailable           503 unavailable (draining, loading; with retry_after_s)
    ├── WorkerFailed          500 worker_failed
    └── ConfigError           refused before anything starts: a key, a checkpoint, a device

A message is written for the person who sent the request or the config; it holds no internals.
"""

from __future__ import annotations


class EllmError(Exception):
    """Root of every error with a meaning for the caller."""

    status = 500
    code = "internal_error"
    kind = "server_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(EllmError):
    """A field of the request cannot be honoured; `param` names it."""

    status = 400
    code = "invalid_value"
    kind = "invalid_request_error"


class PromptTooLong(InvalidRequest):
    """Prompt and requested output do not fit the model's context or the KV pool."""

    code = "context_length_exceeded"


class ModelNotFound(EllmError):
    """No worker serves a model of this name."""

    status = 404
    code = "model_not_found"
    kind = "invalid_request_error"


class QueueFull(EllmError):
    """The bounded queue is full; try again after `retry_after_s`."""

    status = 429
    code = "queue_full"
    kind = "rate_limit_error"


class DeadlineExceeded(EllmError):
    """The request's own deadline passed before it finished."""

    status = 408
    code = "deadline_exceeded"
    kind = "timeout_error"


class Unavailable(EllmError):
    """Nothing can serve this now: loading, draining, or no worker alive."""

    status = 503
    code = "unavailable"
    kind = "server_error"


class WorkerFailed(EllmError):
    """The workers that ran this request died more often than the failover limit allows."""

    code = "worker_failed"


class ConfigError(EllmError):
    """A setting, checkpoint or device that cannot work; raised before any actor starts."""

    status = 400
    code = "config_error"
    kind = "invalid_request_error"
