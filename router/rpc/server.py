"""The grpc.aio server of one router: its services, its limits, its port.

Replicas on one node share the port (SO_REUSEPORT): the kernel gives each new connection to one of them.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from fastapi import FastAPI
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from ellm.router.app import package_version
from ellm.router.config import RouterConfig
from ellm.router.models import Models
from ellm.router.rpc import (
    ellm_inference_pb2,
    ellm_inference_pb2_grpc,
    open_inference_pb2,
    open_inference_pb2_grpc,
    tls,
)
from ellm.router.rpc.guard import Guard
from ellm.router.rpc.health_service import Health
from ellm.router.rpc.inference import Inference
from ellm.router.rpc.open_inference import OpenInference
from ellm.worker.api.errors import ConfigError

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (ellm_inference_pb2, "Inference"),
        (open_inference_pb2, "GRPCInferenceService"),
        (health_pb2, "Health"),
    )
)
_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"  # the same messages as v1alpha
PARAM = "cluster.grpc_port"


@dataclass(frozen=True, slots=True)
class Listen:
    """Where routers listen."""

    host: str
    port: int  # 0: any that is free

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class RpcServer:
    """`start`, then `stop`; both on the loop of the router."""

    def __init__(self, models: Models, guard: Guard, config: RouterConfig, listen: Listen) -> None:
        """Raises ConfigError for a certificate that cannot be used."""
        self.inference = Inference(models, package_version())
        self.port = 0
        self._open = OpenInference(models, package_version())
        self._health = Health(models, SERVICES[:2])
        self._guard = guard
        self._config = config
        self._listen = listen
        self._tls = tls.read_pair(config.grpc)
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Raises ConfigError where it cannot listen."""
        limits = self._config.limits
        server = self._server = grpc.aio.server(
            interceptors=(self._guard,),
            options=_options(limits.max_body_bytes),
            # The router's own limits answer with typed errors; this one must never be reached first.
            maximum_concurrent_rpcs=2 * limits.max_inflight + 1000,
        )
        _add_services(server, self.inference, self._open, self._health)
        check_listen(self._listen)
        try:
            if self._tls is None:
                self.port = server.add_insecure_port(str(self._listen))
            else:
                credentials = grpc.ssl_server_credentials([self._tls])
                self.port = server.add_secure_port(str(self._listen), credentials)
        except RuntimeError:
            raise ConfigError(f"gRPC cannot listen on {self._listen}", param=PARAM) from None
        await server.start()

    async def stop(self, grace_s: float) -> None:
        """Take nothing new, and let what runs end within the grace."""
        self._health.stopping = True
        if self._server is not None:
            await self._server.stop(grace_s)


def _options(max_message_bytes: int) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # A client that is gone without a word is found, and its calls end.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    )


def _add_services(server: Any, inference: Inference, opened: OpenInference, health: Health) -> None:
    ellm_inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)  # type: ignore[no-untyped-call]
    open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(opened, server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (*SERVICES, reflection.SERVICE_NAME)
    reflector = reflection.aio.ReflectionServicer(names)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflector, server)
    newer = grpc.stream_stream_rpc_method_handler(
        reflector.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    methods = {"ServerReflectionInfo": newer}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_REFLECTION_V1, methods),))


def check_listen(listen: Listen) -> None:
    """Raises ConfigError when another program has the port; other routers may have it."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            probe.bind((listen.host, listen.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                reason = f"port {listen.port} is in use by another program; choose one with --grpc-port"
            else:
                reason = f"gRPC cannot listen on {listen}: {error.strerror}"
            raise ConfigError(f"{PARAM}: {reason}", param=PARAM) from None


def with_rpc(app: FastAPI, config: RouterConfig, listen: Listen) -> RpcServer:
    """Let the app's lifespan start and stop a gRPC server beside it. Raises ConfigError."""
    server = RpcServer(app.state.models, Guard(app.state.access, app.state.audit), config, listen)
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(of: FastAPI) -> AsyncIterator[Any]:
        async with inner(of) as state:
            await server.start()
            try:
                yield state
            finally:
                await server.stop(config.drain_timeout_s)

    app.router.lifespan_context = lifespan
    return server
