"""`ellm.v1.Inference.Generate` as a generator speaks it. Knows the exact number of tokens of each message."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from ellm.loadtest.generator.http_client import Done
from ellm.loadtest.generator.options import Options
from ellm.loadtest.generator.record import Record
from ellm.loadtest.generator.target import Target
from ellm.router.rpc.ellm_inference_pb2 import (
    Chat,
    ChatMessage,
    GenerateRequest,
    GetServerInfoRequest,
    SamplingParams,
    TokenIds,
)
from ellm.router.rpc.ellm_inference_pb2_grpc import InferenceStub

STREAMS_PER_CHANNEL = 64  # servers allow about 100 on one connection
MAX_CHANNELS = 16
_OWN = ("cache_salt", "session_id", "tpot_slo_ms", "ttft_slo_ms", "priority")


def open_channel(target: Target, number: int = 0) -> Any:
    """A connection of its own."""
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", -1),
        ("ellm.n", number),
    ]
    address = target.authority
    if target.tls:
        return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(), options=options)
    return grpc.aio.insecure_channel(address, options=options)


def stub_of(channel: Any) -> Any:
    """The calls of `ellm.v1.Inference`."""
    return InferenceStub(channel)  # type: ignore[no-untyped-call]


def metadata_of(target: Target) -> tuple[tuple[str, str], ...]:
    return tuple((name.lower(), value) for name, value in target.headers.items())


def generate_request(
    target: Target, options: Options, messages: list[dict[str, str]], ids: list[int] | None, max_tokens: int
) -> GenerateRequest:
    """One message. Fields of `extra_body` go into the message or its sampling_params, by name."""
    request = GenerateRequest(
        model=target.model, sampling_params=SamplingParams(max_tokens=max_tokens, temperature=0.0)
    )
    if ids is not None:
        request.token_ids.CopyFrom(TokenIds(ids=ids))
    elif options.chat:
        request.chat.CopyFrom(Chat(messages=[ChatMessage(**message) for message in messages]))
    else:
        request.text = "".join(message["content"] for message in messages)
    if options.ignore_eos:
        request.sampling_params.ignore_eos = True
    for name, value in options.extra_body.items():
        setattr(request if name in _OWN else request.sampling_params, name, value)
    return request


class GrpcClient:
    """All requests of one process. `start_s` is the run's zero by the loop's clock."""

    def __init__(self, target: Target, streams: int) -> None:
        self._loop = asyncio.get_running_loop()
        self.start_s = 0.0
        count = min(MAX_CHANNELS, max(1, -(-streams // STREAMS_PER_CHANNEL)))
        self._channels = [open_channel(target, number) for number in range(count)]
        self._stubs = [stub_of(channel) for channel in self._channels]
        self._metadata = metadata_of(target)
        self._sent = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def now(self) -> float:
        return self._loop.time() - self.start_s

    async def open(self, count: int) -> None:
        """Connect every channel. Raises OSError."""
        for channel in self._channels:
            try:
                await asyncio.wait_for(channel.channel_ready(), 10.0)
            except TimeoutError:
                raise OSError("no gRPC server answers there") from None

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    def send(self, request: GenerateRequest, record: Record, done: Done, keep_text: bool = False) -> GrpcCall:
        """Send now; `done(record)` is called once."""
        stub = self._stubs[self._sent % len(self._stubs)]
        self._sent += 1
        record.sent_s = self.now()
        rpc = stub.Generate(request, metadata=self._metadata)
        call = GrpcCall(self, rpc, record, done, keep_text)
        task = self._loop.create_task(call.read())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return call


class GrpcCall:
    """One stream on its way."""

    def __init__(self, client: GrpcClient, rpc: Any, record: Record, done: Done, keep_text: bool) -> None:
        self._client = client
        self._rpc = rpc
        self._record = record
        self._done = done
        self._keep = keep_text
        self._cancelled: str | None = None  # why
        self.ended = False

    async def read(self) -> None:
        """To the end of the stream."""
        record, pieces = self._record, []
        try:
            async for message in self._rpc:
                if count := len(message.token_ids):
                    record.chunk_times.append(self._client.now())
                    record.chunk_tokens.append(count)
                    record.output_tokens += count
                if self._keep:
                    pieces.append(message.text)
                if message.finish_reason:
                    record.finish_reason = message.finish_reason
                    record.prompt_tokens = message.usage.prompt_tokens
                    record.cached_tokens = message.usage.cached_tokens
        except grpc.aio.AioRpcError as error:
            record.error = f"{error.code().name}: {error.details()}"[:200]
        except asyncio.CancelledError:
            record.error = "cancelled"
        if self._cancelled is not None:
            record.error = self._cancelled
        elif not record.error and not record.finish_reason:
            record.error = "the stream ended without a finish_reason"
        record.text = "".join(pieces)
        self.ended = True
        cancelled = self._cancelled == ""
        record.outcome = "cancelled" if cancelled else "failed" if record.error else "completed"
        record.end_s = self._client.now()
        self._done(record)

    def cancel(self, error: str = "") -> None:
        """Cancel the call; with `error` it has failed."""
        if not self.ended and self._cancelled is None:
            self._cancelled = error
            self._rpc.cancel()


async def ask_server(target: Target, timeout_s: float) -> tuple[str, list[str]]:
    """(what it is, its models). Raises grpc.aio.AioRpcError."""
    async with open_channel(target) as channel:
        answer = await stub_of(channel).GetServerInfo(
            GetServerInfoRequest(), metadata=metadata_of(target), timeout=timeout_s
        )
        return f"{answer.server} {answer.version}", list(answer.models)
