"""Logs as one JSON object per line, with the id of the request that is being served where there is one.

For those who gather the logs of a cluster: what the project's own loggers say goes to standard error, which
Ray keeps in a file per process, or passes on where RAY_LOG_TO_STDERR is set. Off unless asked for.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

REQUEST_ID: ContextVar[str] = ContextVar("ellm_request_id", default="")
FORMAT = "ELLM_CLUSTER__LOG_FORMAT"  # where each process finds `cluster.log_format`; and its level
LEVEL = "ELLM_CLUSTER__LOG_LEVEL"
FIELDS = "fields"  # of a record: more members of its object, as `extra={FIELDS: {...}}`
_ROOT = "ellm"


class JsonFormatter(logging.Formatter):
    """time (UTC), level, logger, message, pid; request_id and what a record brings besides; the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        said: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
        }
        if ident := REQUEST_ID.get():
            said["request_id"] = ident
        said.update(getattr(record, FIELDS, {}))
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False, default=str)


def install(process: str) -> None:
    """In a process of the cluster, once: if its environment asks for JSON, it logs so. `process`: router,
    worker or controller."""
    if os.environ.get(FORMAT) != "json":
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(lambda record: _named(record, process))
    logger = logging.getLogger(_ROOT)
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(os.environ.get(LEVEL, "info").upper())


def _named(record: logging.LogRecord, process: str) -> bool:
    setattr(record, FIELDS, {"process": process, **getattr(record, FIELDS, {})})
    return True
