"""Lets an application describe itself: the document as it is when somebody asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from ellm.router.config import LimitsConfig
from ellm.router.models import Models
from ellm.router.openapi.document import document
from ellm.router.openapi.requests import MAX_INT, Bounds


def describe(app: FastAPI, models: Models, limits: LimitsConfig, needs_key: Callable[[], bool]) -> None:
    """Replace what FastAPI would make up."""

    def made() -> dict[str, Any]:
        return document(app.title, app.version, bounds(models, limits), paths_of(app), needs_key())

    app.openapi = made  # type: ignore[method-assign]


def paths_of(app: FastAPI) -> set[str]:
    """Of all routes, as OpenAPI writes them."""
    return {str(getattr(route, "path_format", None) or getattr(route, "path", "")) for route in app.routes}


def bounds(models: Models, limits: LimitsConfig) -> Bounds:
    """What holds for every model that is served."""
    services = models.services.values()
    infos = [info for service in services if (info := service.dispatcher.info()) is not None]
    return Bounds(
        limits,
        tuple(models.services),
        min([info.vocab_size for info in infos] or [s.tokenizer.vocab_size for s in services]),
        min((info.max_model_len for info in infos), default=MAX_INT),
    )
