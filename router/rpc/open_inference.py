"""inference.GRPCInferenceService: the Open Inference Protocol, version 2, for text that is completed.

ModelInfer takes `text_input` and the fields of a completion as parameters, and gives `text_output`,
`finish_reason` and `num_output_tokens`, one element per text (n of them where n is asked for).
"""

from __future__ import annotations

from typing import Any

from ellm.router import health
from ellm.router.config import LimitsConfig
from ellm.router.models import Models
from ellm.router.openai.schema import NEUTRAL
from ellm.router.rpc import open_inference_pb2 as pb
from ellm.router.rpc.bodies import fields_named
from ellm.router.rpc.call_context import CallContext
from ellm.router.rpc.guard import CALLER
from ellm.router.rpc.outputs import Delta
from ellm.router.rpc.running import generating, running
from ellm.router.rpc.tensors import TEXT_INPUT, add_numbers, add_texts, read_texts
from ellm.worker.api.errors import InvalidRequest, ModelNotFound

VERSION = "1"  # of every model
OUTPUTS = ("text_output", "finish_reason", "num_output_tokens")
MAX_PARAMETERS = 64
# Of a completion's fields, those that have no meaning here.
_REFUSED = frozenset(
    {
        "model", "prompt", "stream", "stream_options", "stream_pace", "echo", "logprobs", "return_token_ids",
        *NEUTRAL,
    }
)  # fmt: skip


class OpenInference:
    """The methods of the service; the guard has checked who calls."""

    def __init__(self, models: Models, version: str) -> None:
        self._models = models
        self._version = version

    async def ServerLive(self, request: pb.ServerLiveRequest, context: CallContext) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=self._models.alive().ok)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: CallContext
    ) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._models.ready()[0].ok)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: CallContext) -> pb.ModelReadyResponse:
        key = CALLER.get().key
        if request.name in self._models.broken and (key is None or key.may_use(request.name)):
            return pb.ModelReadyResponse(ready=False)
        service = self._models.find(request.name or None, key)
        _check_version(request.version)
        return pb.ModelReadyResponse(ready=health.ready(service.dispatcher).ok)

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: CallContext
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="ellm", version=self._version)

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: CallContext
    ) -> pb.ModelMetadataResponse:
        service = self._models.find(request.name or None, CALLER.get().key)
        _check_version(request.version)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=service.model,
            versions=[VERSION],
            platform="ellm",
            inputs=[tensor(name=TEXT_INPUT, datatype="BYTES", shape=[-1])],
            outputs=[
                tensor(name=name, datatype="INT64" if name.startswith("num_") else "BYTES", shape=[-1])
                for name in OUTPUTS
            ],
        )

    async def ModelInfer(self, request: pb.ModelInferRequest, context: CallContext) -> pb.ModelInferResponse:
        service = self._models.find(request.model_name or None, CALLER.get().key)
        _check_version(request.model_version)
        async with running(service) as call:
            body, wanted = _body(request, service.config.limits), _wanted(request)
            with fields_named({"prompt": TEXT_INPUT}):
                async with generating(service, "completion", body, call, whole=True) as outputs:
                    deltas = await outputs.more()
        return _answer(request, service.model, wanted, deltas)


def _check_version(version: str) -> None:
    if version not in ("", VERSION):
        raise ModelNotFound(f"every model has the one version {VERSION}", param="version")


def _body(request: pb.ModelInferRequest, limits: LimitsConfig) -> dict[str, Any]:
    """The completion that is asked for. Raises InvalidRequest."""
    if len(request.parameters) > MAX_PARAMETERS:
        raise InvalidRequest(f"parameters: at most {MAX_PARAMETERS}", param="parameters")
    texts = read_texts(request, limits.max_prompts)
    body: dict[str, Any] = {}
    for name, parameter in request.parameters.items():
        shown = name[:64].encode("ascii", "replace").decode()
        if name in _REFUSED:
            raise InvalidRequest(f"{shown} is not a parameter of ModelInfer", param=shown)
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise InvalidRequest(f"{shown}: has no value", param=shown)
        body[name] = getattr(parameter, choice)
    body["prompt"] = texts
    return body


def _wanted(request: pb.ModelInferRequest) -> tuple[str, ...]:
    """Names of outputs, all where none are named. Raises InvalidRequest."""
    if len(request.outputs) > len(OUTPUTS):
        raise InvalidRequest(f"outputs: at most {len(OUTPUTS)}", param="outputs")
    for index, output in enumerate(request.outputs):
        if output.name not in OUTPUTS:
            raise InvalidRequest(f"outputs: one of {', '.join(OUTPUTS)}", param=f"outputs[{index}].name")
        if output.parameters:
            param = f"outputs[{index}].parameters"
            raise InvalidRequest("outputs: a tensor has no parameters here", param=param)
    return tuple(dict.fromkeys(output.name for output in request.outputs)) or OUTPUTS


def _answer(
    request: pb.ModelInferRequest, model: str, wanted: tuple[str, ...], deltas: list[Delta]
) -> pb.ModelInferResponse:
    response = pb.ModelInferResponse(model_name=model, model_version=VERSION, id=request.id)
    raw, num_texts = bool(request.raw_input_contents), request.inputs[0].shape[0]
    n = len(deltas) // num_texts
    shape = [num_texts] if n == 1 else [num_texts, n]
    for name in wanted:
        if name == "text_output":
            add_texts(response, name, shape, ["".join(delta.texts) for delta in deltas], raw)
        elif name == "finish_reason":
            add_texts(response, name, shape, [delta.finish_reason or "" for delta in deltas], raw)
        else:
            add_numbers(response, name, shape, [len(delta.sequence.output_ids) for delta in deltas], raw)
    return response
