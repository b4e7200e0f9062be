"""The endpoints for those who run the cluster: health, metrics, the workers, and what the page draws."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from fastapi import FastAPI, Response

from ellm.router import health, overview
from ellm.router.errors import UnknownRequest
from ellm.router.http_bodies import JSON_TYPE
from ellm.router.metrics_page import CONTENT_TYPE
from ellm.router.metrics_sharing import SharedMetrics
from ellm.router.models import Models
from ellm.router.timeline import Timelines


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, JSON_TYPE.decode())


def add_operations(app: FastAPI, models: Models, shared: SharedMetrics, version: str) -> None:
    """Health, version, metrics, workers."""

    def get(path: str, answer: Callable[[], Response]) -> None:
        async def endpoint() -> Response:
            return answer()

        endpoint.__name__ = path.strip("/").replace("/", "_")
        handler: Callable[[], Awaitable[Response]] = endpoint
        app.get(path)(handler)

    def state(found: health.Health, **more: Any) -> Response:
        headers = {} if found.ok else {"retry-after": "1"}
        body = {"status": found.status, "reason": found.reason, **more}
        return json_response(body, 200 if found.ok else 503, headers)

    def ready() -> Response:
        found, states = models.ready()
        return state(found, models=states)

    def workers() -> list[dict[str, Any]]:
        return [row for service in models.services.values() for row in health.workers(service.dispatcher)]

    get("/health", lambda: state(models.alive()))
    get("/health/ready", ready)
    get("/version", lambda: json_response({"version": version}))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await shared.text(), media_type=None, headers={"content-type": CONTENT_TYPE})

    get("/admin/workers", lambda: json_response({"workers": workers()}))


def add_pictures(app: FastAPI, models: Models, shared: SharedMetrics, timelines: Timelines) -> None:
    """What the page draws."""

    @app.get("/admin/cluster")
    async def cluster() -> Response:
        return json_response(overview.overview(await shared.look(), list(models.services)))

    @app.get("/admin/requests")
    async def latest_requests() -> Response:
        return json_response({"requests": timelines.latest(100)})

    @app.get("/admin/requests/{request_id}")
    async def one_request(request_id: str) -> Response:
        found = await shared.find(request_id)
        if found is None:
            raise UnknownRequest("no router knows that request, or not any more")
        return Response(found, media_type=JSON_TYPE.decode())
