"""The router's HTTP application: OpenAI's endpoints over whatever workers the directory names.

Puts the parts together and owns the small endpoints. Runs under any ASGI server, in a Ray Serve replica or in
a test; it imports neither Ray nor torch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ellm.router import service_level
from ellm.router.access import Access
from ellm.router.audit import AuditLog, audit_path
from ellm.router.config import RouterConfig
from ellm.router.dispatch import Dispatcher
from ellm.router.edge import CONTEXT, Edge, key_of
from ellm.router.errors import UnknownRoute, WrongMethod
from ellm.router.exchange import Exchange, Service
from ellm.router.guidance import ControllerLine, GuidanceBook, GuidanceLoop
from ellm.router.http_bodies import BodyReader, send_error, unfinished
from ellm.router.key_ring import KeyRing
from ellm.router.metrics import RouterMetrics
from ellm.router.metrics_sharing import Outlet, SharedMetrics
from ellm.router.models import Models
from ellm.router.openai.answer import error_body
from ellm.router.openai.convert import Converter
from ellm.router.openai.schema import (
    DetokenizeRequest,
    TokenizeRequest,
    parse,
)
from ellm.router.openapi.description import describe
from ellm.router.operations import add_operations, add_pictures, json_response
from ellm.router.page_files import add_page
from ellm.router.tenants import TenantLimits
from ellm.router.timeline import Timelines
from ellm.router.tokenizer import Tokenizer, in_text_thread
from ellm.worker.api.channel import WorkerDirectory
from ellm.worker.api.errors import EllmError, InvalidRequest, PromptTooLong

STARTED_AT = int(time.time())

MAX_TOKENS_OF_CALL = 200_000  # of /tokenize and /detokenize


def package_version() -> str:
    try:
        return version("ellm-on-ray")
    except PackageNotFoundError:
        return "0.0.0+source"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """One model: its served name, its tokenizer (or the checkpoint's folder), and where its workers are."""

    name: str
    tokenizer: Tokenizer | Path
    directory: WorkerDirectory


def make_service(
    source: ModelSource,
    config: RouterConfig,
    tenants: TenantLimits,
    timelines: Timelines,
    clock: Callable[[], float],
) -> Service:
    """Raises ConfigError for a tokenizer that cannot be read."""
    name, tokenizer = source.name, source.tokenizer
    if isinstance(tokenizer, Path):
        tokenizer = Tokenizer.load(tokenizer)
    metrics = RouterMetrics(name, clock)
    return Service(
        config=config,
        model=name,
        fingerprint="fp_" + blake2b(f"{package_version()}/{name}".encode(), digest_size=5).hexdigest(),
        tokenizer=tokenizer,
        converter=Converter(tokenizer, config.limits),
        dispatcher=Dispatcher(source.directory, config, metrics, clock),
        metrics=metrics,
        tenants=tenants,
        timelines=timelines,
    )


def create_app(
    config: RouterConfig,
    sources: Sequence[ModelSource],
    *,
    broken: Mapping[str, str] | None = None,
    controller: ControllerLine | None = None,
    outlet: Outlet | None = None,
    clock: Callable[[], float] = time.monotonic,
    echo_request_id: bool = True,
) -> FastAPI:
    """Starting the app (its lifespan) opens the lines to the workers. `broken`: models that cannot be served,
    and why. Without a `controller` nobody advises. `outlet`: where metrics go beside their page.
    `echo_request_id` is off where the server around the app does it. Raises ConfigError."""
    keys = KeyRing(config.api_keys, None if config.api_key_file is None else Path(config.api_key_file))
    access = Access(keys, config.admin_key, clock)
    audit = AuditLog(audit_path(config.audit_log, access.guarded))
    bodies = BodyReader(config.limits)
    book = GuidanceBook(config.num_replicas)
    tenants = TenantLimits(book.budget, lambda: book.num_routers)
    timelines = Timelines(clock)
    made = [make_service(source, config, tenants, timelines, clock) for source in sources]
    models = Models(made, broken)
    services = models.services.values()
    guidance = GuidanceLoop(
        book,
        controller,
        models.links,
        uses=lambda: tenants.uses(clock()),
        prompts=lambda: {service.model: service.dispatcher.poison for service in services},
        clock=clock,
    )
    shared = SharedMetrics(services, book, outlet or Outlet(), timelines.find, clock, (keys, audit))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for service in services:
            await service.dispatcher.start()
        guidance.start()
        shared.start()
        watch = asyncio.create_task(keys.watch(clock))
        try:
            yield
        finally:
            watch.cancel()
            await shared.close()
            await guidance.close()
            for service in services:
                await service.dispatcher.close()
            await asyncio.to_thread(audit.close)

    app = FastAPI(
        title="eLLM on Ray",
        version=package_version(),
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # those pages run scripts of other hosts, where the page at `/` keeps its keys
        redoc_url=None,
    )
    app.state.models = models
    app.state.guidance = book
    app.state.access = access
    app.state.audit = audit
    _guard(app, config, access, audit, echo_request_id)
    _add_endpoints(app, models, bodies)
    add_operations(app, models, shared, package_version())
    add_pictures(app, models, shared, timelines)
    add_page(app)
    describe(app, models, config.limits, lambda: keys.needed)
    return app


def _add_endpoints(app: FastAPI, models: Models, bodies: BodyReader) -> None:
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(EllmError, _ellm_error)
    _add_generation(app, models, bodies)
    _add_models(app, models)
    _add_tokens(app, models, bodies)


def _guard(
    app: FastAPI, config: RouterConfig, access: Access, audit: AuditLog, echo_request_id: bool
) -> None:
    """What every request passes first."""
    app.add_middleware(
        Edge, access=access, limits=config.limits, audit=audit, echo_request_id=echo_request_id
    )
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=[
                *("authorization", "content-type", "x-request-id", "x-session-id"),
                *service_level.HEADER_NAMES,
            ],
        )


async def _http_exception(request: Request, raised: Exception) -> Response:
    """Starlette's own: an unknown path, a wrong method."""
    assert isinstance(raised, HTTPException)
    if raised.status_code == 404:
        error: EllmError = UnknownRoute("no such path")
    elif raised.status_code == 405:
        error = WrongMethod(f"this path does not take {request.method[:16]}")
    else:
        error = InvalidRequest("the request cannot be read")
    return json_response(error_body(error), error.status, dict(raised.headers or {}))


async def _ellm_error(request: Request, raised: Exception) -> Response:
    assert isinstance(raised, EllmError)
    return _Refusal(raised)


class _Refusal(Response):
    """A typed error as a response."""

    def __init__(self, error: EllmError) -> None:
        self.background = None
        self._error = error

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope[CONTEXT].record.error = self._error.code
        await send_error(send, self._error, receive if unfinished(self._error) else None)


def _add_generation(app: FastAPI, models: Models, bodies: BodyReader) -> None:
    @app.post("/v1/completions")
    async def completions() -> Response:
        return Exchange(models, "completion", bodies)

    @app.post("/v1/chat/completions")
    async def chat_completions() -> Response:
        return Exchange(models, "chat", bodies)


def _add_models(app: FastAPI, models: Models) -> None:
    def card(service: Service) -> dict[str, Any]:
        info = service.dispatcher.info()
        return {
            "id": service.model,
            "object": "model",
            "created": STARTED_AT,
            "owned_by": "ellm",
            "root": service.model,
            "parent": None,
            "max_model_len": None if info is None else info.max_model_len,
        }

    @app.get("/v1/models")
    async def list_models(request: Request) -> Response:
        visible = models.visible(key_of(request.scope))
        return json_response({"object": "list", "data": [card(service) for service in visible]})

    @app.get("/v1/models/{model_id:path}")
    async def model(request: Request, model_id: str) -> Response:
        return json_response(card(models.find(model_id, key_of(request.scope))))


def _add_tokens(app: FastAPI, models: Models, bodies: BodyReader) -> None:
    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = parse(TokenizeRequest, await bodies.json(request.scope, request.receive))
        service = models.find(body.model, key_of(request.scope))
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("one of prompt and messages", param="prompt")
        chat = body.prompt is None
        text = await service.converter.rendered(body) if chat else body.prompt or ""
        special = not chat if body.add_special_tokens is None else body.add_special_tokens
        ids = await service.tokenizer.encode_async(text, special)
        if len(ids) > MAX_TOKENS_OF_CALL:
            raise PromptTooLong(f"prompt: more than {MAX_TOKENS_OF_CALL} tokens", param="prompt")
        info = service.dispatcher.info()
        strings = [service.tokenizer.token(i) for i in ids] if body.return_token_strs else None
        return json_response(
            {
                "count": len(ids),
                "max_model_len": None if info is None else info.max_model_len,
                "tokens": ids,
                "token_strs": strings,
            }
        )

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = parse(DetokenizeRequest, await bodies.json(request.scope, request.receive))
        service = models.find(body.model, key_of(request.scope))
        if len(body.tokens) > MAX_TOKENS_OF_CALL:
            raise PromptTooLong(f"tokens: at most {MAX_TOKENS_OF_CALL}", param="tokens")
        skip = bool(body.skip_special_tokens)
        return json_response({"prompt": await in_text_thread(service.tokenizer.decode, body.tokens, skip)})
