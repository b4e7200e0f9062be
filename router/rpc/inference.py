"""ellm.v1.Inference: generates by the path of HTTP, and says what the router knows of models and load."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ellm.router import health
from ellm.router.exchange import Service
from ellm.router.link import WorkerLink
from ellm.router.models import Models
from ellm.router.openai.logprobs import LOWEST
from ellm.router.rpc import ellm_inference_pb2 as pb
from ellm.router.rpc.bodies import MAX_REQUEST_ID, fields_named, generate_body
from ellm.router.rpc.call_context import CallContext
from ellm.router.rpc.guard import CALLER
from ellm.router.rpc.outputs import Delta, Outputs
from ellm.router.rpc.running import RunningCall, RunningCalls, generating, running
from ellm.router.sequence import ScoredToken
from ellm.router.tokenizer import Tokenizer
from ellm.worker.api.errors import InvalidRequest, Unavailable


class Inference:
    """The methods of the service; the guard has checked who calls."""

    def __init__(self, models: Models, version: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.calls = RunningCalls()
        self._models = models
        self._version = version
        self._clock = clock
        self._started_at = clock()

    async def Generate(self, request: pb.GenerateRequest, context: CallContext) -> None:
        caller = CALLER.get()
        ident = request.request_id or caller.request_id
        if len(ident) > MAX_REQUEST_ID:
            raise InvalidRequest(f"request_id: at most {MAX_REQUEST_ID} characters", param="request_id")
        service = self._models.find(request.model or None, caller.key)
        whole = request.HasField("stream") and not request.stream
        async with running(service) as call:
            with self.calls.named(caller.tenant, ident, call), _fields_of(request):
                kind, body = generate_body(request, service.config.limits)
                async with generating(service, kind, body, call, whole, request.session_id) as outputs:
                    await _send(context, ident, outputs, call, service.tokenizer)

    async def Abort(self, request: pb.AbortRequest, context: CallContext) -> pb.AbortResponse:
        return pb.AbortResponse(success=self.calls.abort(CALLER.get().tenant, request.request_id))

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: CallContext
    ) -> pb.GetModelInfoResponse:
        service = self._models.find(request.model or None, CALLER.get().key)
        info = service.dispatcher.info()
        if info is None:
            raise Unavailable("no worker of this model is up yet", retry_after_s=5.0)
        return pb.GetModelInfoResponse(
            served_model_name=service.model,
            is_ready=health.ready(service.dispatcher).ok,
            max_context_length=info.max_model_len,
            vocab_size=info.vocab_size,
            eos_token_ids=info.eos_token_ids,
            block_size=info.block_size,
            tensor_parallel_size=info.tensor_parallel_size,
            device=info.device,
            dtype=info.dtype,
            deterministic=info.deterministic,
        )

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: CallContext
    ) -> pb.GetServerInfoResponse:
        services = list(self._models.services.values())
        limits = services[0].config.limits
        return pb.GetServerInfoResponse(
            server="ellm",
            version=self._version,
            models=[service.model for service in self._models.visible(CALLER.get().key)],
            uptime_s=self._clock() - self._started_at,
            max_message_bytes=limits.max_body_bytes,
            max_inflight=limits.max_inflight,
            num_inflight=sum(service.dispatcher.admission.num_inflight for service in services),
        )

    async def GetLoads(self, request: pb.GetLoadsRequest, context: CallContext) -> pb.GetLoadsResponse:
        services = [self._models.find(request.model)] if request.model else self._models.services.values()
        loads = [
            _load(service, link)
            for service in services
            for link in sorted(service.dispatcher.links.values(), key=lambda link: link.info.worker_id)
        ]
        return pb.GetLoadsResponse(version=self._version, loads=loads)


async def _send(
    context: CallContext, ident: str, outputs: Outputs, call: RunningCall, tokenizer: Tokenizer
) -> None:
    """All that comes, until it ends."""
    deltas = await outputs.more()
    await call.send(context.send_initial_metadata((("x-request-id", CALLER.get().request_id),)))
    while deltas:
        for delta in deltas:
            await call.send(context.write(_response(ident, delta, tokenizer)))
        deltas = await outputs.more()


def _fields_of(request: pb.GenerateRequest) -> Any:
    """Errors name this message's fields."""
    chosen = request.WhichOneof("input") or "input"
    return fields_named({"prompt": chosen, "messages": "chat.messages", "top_logprobs": "logprobs"})


def _response(ident: str, delta: Delta, tokenizer: Tokenizer) -> pb.GenerateResponse:
    sequence = delta.sequence
    response = pb.GenerateResponse(
        request_id=ident, index=sequence.index, text="".join(delta.texts), token_ids=delta.token_ids
    )
    if delta.scored:
        response.logprobs.extend(_scored(entry, tokenizer) for entry in delta.scored)
    if delta.finish_reason is not None:
        response.finish_reason = delta.finish_reason
        response.usage.prompt_tokens = len(sequence.prompt_ids)
        response.usage.completion_tokens = len(sequence.output_ids)
        response.usage.cached_tokens = sequence.num_cached_tokens
    return response


def _scored(entry: ScoredToken, tokenizer: Tokenizer) -> pb.OutputLogprob:
    assert entry.logprobs is not None  # no prompt is scored here
    return pb.OutputLogprob(
        token=_logprob(entry.token_id, entry.logprobs.logprob, tokenizer),
        top=[_logprob(token_id, logprob, tokenizer) for token_id, logprob in entry.logprobs.top],
    )


def _logprob(token_id: int, logprob: float, tokenizer: Tokenizer) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=token_id, logprob=max(logprob, LOWEST), token=tokenizer.token_bytes(token_id)
    )


def _load(service: Service, link: WorkerLink) -> pb.WorkerLoad:
    load = pb.WorkerLoad(worker_id=link.info.worker_id, model=service.model, state=health.state(link))
    report = link.report
    if report is None:
        return load
    total = report.num_blocks * link.info.block_size
    used = total - (report.free_blocks + report.cached_blocks) * link.info.block_size
    load.num_running_reqs = report.num_running
    load.num_waiting_reqs = report.num_waiting
    load.num_used_tokens = max(0, used)
    load.max_total_num_tokens = total
    load.token_usage = max(0, used) / total if total else 0.0
    load.num_waiting_uncached_tokens = report.waiting_tokens
    load.headroom_tokens = report.headroom_tokens
    load.running_uncached_tokens = report.uncached_tokens
    load.uncached_token_ratio = report.uncached_token_ratio
    load.num_parked_reqs = report.num_parked
    load.recompute_debt_s = report.recompute_debt_s
    load.report_age_s = max(0.0, service.dispatcher.clock() - link.reported_at)
    load.max_running_requests = report.max_running
    return load
