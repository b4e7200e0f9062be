"""grpc.health.v1.Health, truthful: serving means that a worker takes requests and makes progress.

A status is worked out when it is asked for; who watches is told of a change within half a second.
"""

from __future__ import annotations

import asyncio
from typing import Any

from grpc_health.v1 import health_pb2 as pb

from ellm.router.models import Models
from ellm.router.rpc.call_context import CallContext
from ellm.worker.api.errors import EllmError, QueueFull

WATCH_S = 0.5
MAX_WATCHERS = 256  # they need no key
_SHOWN = 64


class UnknownService(EllmError):
    """The server has no such service."""

    status = 404
    code = "not_found"
    kind = "invalid_request_error"


class Health:
    """Answers for the services it is told of, and for "", the whole."""

    def __init__(self, models: Models, services: tuple[str, ...]) -> None:
        self._models = models
        self._services = frozenset({"", *services})
        self._num_watchers = 0
        self.stopping = False  # set when the server takes nothing new

    async def Check(self, request: pb.HealthCheckRequest, context: CallContext) -> pb.HealthCheckResponse:
        if request.service not in self._services:
            shown = request.service[:_SHOWN].encode("ascii", "replace").decode()
            raise UnknownService(f"there is no service {shown!r} here", param="service")
        return pb.HealthCheckResponse(status=self._status(request.service))

    async def List(self, request: pb.HealthListRequest, context: CallContext) -> pb.HealthListResponse:
        statuses = {
            name: pb.HealthCheckResponse(status=self._status(name)) for name in sorted(self._services)
        }
        return pb.HealthListResponse(statuses=statuses)

    async def Watch(self, request: pb.HealthCheckRequest, context: CallContext) -> None:
        if self._num_watchers >= MAX_WATCHERS:
            raise QueueFull("too many watch already; use Check", retry_after_s=5.0)
        self._num_watchers += 1
        try:
            last = None
            while not self.stopping:
                now = self._status(request.service)
                if now != last:
                    await context.write(pb.HealthCheckResponse(status=now))
                last = now
                await asyncio.sleep(WATCH_S)
            await context.write(pb.HealthCheckResponse(status=self._status(request.service)))
        finally:
            self._num_watchers -= 1

    def _status(self, service: str) -> Any:
        if service not in self._services:
            return pb.HealthCheckResponse.SERVICE_UNKNOWN
        serving = not self.stopping and self._models.ready()[0].ok
        return pb.HealthCheckResponse.SERVING if serving else pb.HealthCheckResponse.NOT_SERVING
