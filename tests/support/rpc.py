"""A gRPC client of a RouterServer, and what tests ask: how a call ended, and that nothing of it is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from support.router_server import RouterServer, wait_until

from ellm.router.rpc.ellm_inference_pb2 import GenerateRequest, GenerateResponse, SamplingParams
from ellm.router.rpc.ellm_inference_pb2_grpc import InferenceStub
from ellm.router.rpc.open_inference_pb2_grpc import GRPCInferenceServiceStub

WAIT_S = 60.0  # on a busy machine; nothing waits so long


class Client:
    """One connection."""

    def __init__(self, server: RouterServer, **options: int) -> None:
        self.address = f"127.0.0.1:{server.rpc.port}"
        # Channels of equal options share a connection unless they are told not to.
        given = [("grpc.use_local_subchannel_pool", 1), *((f"grpc.{k}", v) for k, v in options.items())]
        self.channel = grpc.insecure_channel(self.address, given)
        self.inference = InferenceStub(self.channel)
        self.open = GRPCInferenceServiceStub(self.channel)

    def generate(
        self, request: GenerateRequest, metadata: Any = None, timeout_s: float = WAIT_S
    ) -> list[GenerateResponse]:
        return list(self.inference.Generate(request, metadata=metadata, timeout=timeout_s))

    def close(self) -> None:
        self.channel.close()


@contextmanager
def rpc_client(server: RouterServer, **options: int) -> Iterator[Client]:
    client = Client(server, **options)
    try:
        yield client
    finally:
        client.close()


def request(text: str = "hello world", **params: Any) -> GenerateRequest:
    """A greedy one of two tokens, unless `params` says otherwise."""
    values = {"max_tokens": 2, "temperature": 0.0, **params}
    return GenerateRequest(text=text, sampling_params=SamplingParams(**values))


def text_of(responses: list[GenerateResponse], index: int = 0) -> str:
    return "".join(one.text for one in responses if one.index == index)


def refused(
    call: Callable[[], Any], code: grpc.StatusCode, param: str | None = None, error: str | None = None
) -> grpc.RpcError:
    """The call ends so, names the field, and says nothing of what is inside."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    found = caught.value
    assert found.code() is code, found
    details = found.details()
    assert details
    assert not any(word in details for word in ("Traceback", ".py", "Exception", "object at", "Unexpected"))
    metadata = trailing(found)
    if param is not None:
        assert metadata["ellm-error-param"] == param, found
        assert param.partition("[")[0] in details
    if error is not None:
        assert metadata["ellm-error-code"] == error, found
    return found


def trailing(call: Any) -> dict[str, str]:
    return {name: value for name, value in call.trailing_metadata() or ()}


def assert_served(client: Client, metadata: Any = None) -> None:
    last = client.generate(request("fine", ignore_eos=True), metadata)[-1]
    assert last.finish_reason == "length"
    assert last.usage.completion_tokens == 2


def assert_nothing_left(server: RouterServer) -> None:
    """Neither in the router, nor in the front, nor in the engine: every block is free or merely cached."""
    dispatcher, worker = server.service.dispatcher, server.workers[0]

    def left() -> list[int]:
        return [
            len(server.rpc.inference.calls),
            dispatcher.admission.num_inflight,
            sum(len(link.live) for link in dispatcher.links.values()),
            worker.front.num_live,
            worker.limits.num_blocks - worker.free_blocks(),
        ]

    wait_until(lambda: server.on_loop(left) == [0] * 5, 30)
