"""Logs as JSON: one object per line, with the id of the request that is being served."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextvars import copy_context

import pytest

from ellm.worker.api import json_log


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    root = logging.getLogger("ellm")
    before = root.handlers, root.propagate, root.level
    yield root
    root.handlers, root.propagate = before[:2]
    root.setLevel(before[2])


def test_a_line_is_an_object(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(json_log.FORMAT, "json")
    monkeypatch.setenv(json_log.LEVEL, "info")
    json_log.install("router")

    def serve() -> None:
        json_log.REQUEST_ID.set("req-1")
        log = logging.getLogger("ellm.router.edge")
        log.debug("too much")
        log.info("two\nlines of %s", "text", extra={json_log.FIELDS: {"model": "m"}})
        try:
            raise ValueError("why")
        except ValueError:
            log.exception("failed")

    copy_context().run(serve)
    logging.getLogger("ellm.worker").warning("outside")
    first, second, third = map(json.loads, capsys.readouterr().err.splitlines())
    assert first["message"] == "two\nlines of text"
    assert (first["level"], first["logger"], first["process"]) == ("info", "ellm.router.edge", "router")
    assert (first["request_id"], first["model"]) == ("req-1", "m")
    assert first["time"].endswith("Z")
    assert "ValueError: why" in second["exception"]
    assert "request_id" not in third


def test_it_is_off_unless_asked_for(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(json_log.FORMAT, raising=False)
    before = list(logger.handlers)
    json_log.install("worker")
    assert logger.handlers == before
