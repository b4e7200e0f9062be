"""Messages for the gRPC server that nobody means: of any bytes, of extreme values, and many that are fine."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from ellm.router.rpc import ellm_inference_pb2, open_inference_pb2

MODEL = "pydoc-5m"  # the one that ships
SERVICES = (
    ellm_inference_pb2.DESCRIPTOR.services_by_name["Inference"],
    open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
)
MESSAGES = {
    message.full_name: getattr(module, message.name)
    for module in (ellm_inference_pb2, open_inference_pb2)
    for message in module.DESCRIPTOR.message_types_by_name.values()
}
GENERATE = "/ellm.v1.Inference/Generate"
INFER = "/inference.GRPCInferenceService/ModelInfer"
METHODS = {
    f"/{service.full_name}/{method.name}": MESSAGES[method.input_type.full_name]
    for service in SERVICES
    for method in service.methods
}
TEXTS = ("", "x", "\x00", "ünï", "\U0001f600" * 50, "a" * 5000, "text_input", "BYTES", MODEL, "stop\n", "1")
DOUBLES = (0.0, -0.0, 1.0, 0.5, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"), 2.0000001)
EDGES = (0, 1, 2, 16, 127, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**31), -(2**63))
_BITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


@dataclass(frozen=True, slots=True)
class Call:
    """What is sent, and after how long the client leaves."""

    method: str
    data: bytes
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    timeout_s: float = 60.0
    good: bool = False  # it should reach the engine


def calls(seed: int, count: int) -> Iterator[Call]:
    rng = random.Random(seed)
    makers: list[tuple[float, Callable[[random.Random], Call]]] = [
        (0.45, good), (0.15, extreme), (0.15, mutated), (0.1, noise), (0.1, mixed), (0.05, leaving),
    ]  # fmt: skip
    weights = [weight for weight, _ in makers]
    for _ in range(count):
        ((_, make),) = rng.choices(makers, weights)
        yield make(rng)


def good(rng: random.Random) -> Call:
    """Within every limit."""
    if rng.random() < 0.25:
        message = open_inference_pb2.ModelInferRequest(model_name=rng.choice(("", MODEL)))
        texts = [b"some text %d" % rng.randrange(1000) for _ in range(rng.randrange(1, 4))]
        tensor = message.inputs.add(name="text_input", datatype="BYTES", shape=[len(texts)])
        tensor.contents.bytes_contents.extend(texts)
        message.parameters["max_tokens"].int64_param = rng.randrange(1, 9)
        return Call(INFER, message.SerializeToString(), good=True)
    request = ellm_inference_pb2.GenerateRequest(model=rng.choice(("", MODEL)))
    if rng.random() < 0.3:
        request.token_ids.ids.extend(rng.randrange(4096) for _ in range(rng.randrange(1, 40)))
    elif rng.random() < 0.3:
        request.chat.messages.add(role="user", content=f"a word and {rng.random()}")
    else:
        request.text = f"once {rng.random()} upon"
    params = request.sampling_params
    params.max_tokens, params.n = rng.randrange(1, 20), rng.randrange(1, 4)
    params.temperature, params.seed = rng.choice((0.0, 0.7, 2.0)), rng.choice((-(2**63), 0, 2**63 - 1))
    if rng.random() < 0.3:
        params.logprobs = rng.randrange(4)
    if rng.random() < 0.3:
        params.stop.append(rng.choice(("upon", "\x00", "ü")))
    request.stream = rng.random() < 0.8
    return Call(GENERATE, request.SerializeToString(), good=True)


def extreme(rng: random.Random) -> Call:
    """A message of the right type whose values are anything."""
    method, kind = rng.choice(list(METHODS.items()))
    message = kind()
    fill(rng, message, 0)
    return Call(method, message.SerializeToString())


def mutated(rng: random.Random) -> Call:
    """A good one with some bytes changed, cut or doubled."""
    call = good(rng)
    data = bytearray(call.data)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(data)) if data else 0
        match rng.randrange(4):
            case 0 if data:
                data[at] = rng.randrange(256)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = data[: rng.randrange(50)]
            case _:
                data += rng.randbytes(rng.randrange(20))
    return Call(call.method, bytes(data))


def noise(rng: random.Random) -> Call:
    return Call(rng.choice(list(METHODS)), rng.randbytes(rng.choice((0, 1, 7, 300, 20_000))))


def mixed(rng: random.Random) -> Call:
    """Odd metadata, or the message of another method."""
    call = good(rng)
    names = (
        "x-request-id",
        "x-session-id",
        "authorization",
        "x-api-key",
        "x-ellm-priority",
        "x-ellm-tpot-slo-ms",
    )
    values = ("", " ", "x" * 2000, "Bearer", "Bearer x", "-1", "1e9", "nan", "9" * 40, "\x7f"[:0] + "~!@")
    metadata = tuple((rng.choice(names), rng.choice(values)) for _ in range(rng.randrange(1, 4)))
    method = call.method if rng.random() < 0.7 else rng.choice(list(METHODS))
    return Call(method, call.data, (*metadata, ("odd-bin", rng.randbytes(30))))


def leaving(rng: random.Random) -> Call:
    """A long one whose client gives up."""
    params = ellm_inference_pb2.SamplingParams(max_tokens=200, ignore_eos=True, n=rng.randrange(1, 9))
    request = ellm_inference_pb2.GenerateRequest(text=f"long {rng.random()}", sampling_params=params)
    return Call(GENERATE, request.SerializeToString(), timeout_s=rng.choice((0.001, 0.01, 0.05)))


def fill(rng: random.Random, message: Any, depth: int) -> None:
    """Set some fields of a message to values of their types, most of them at an edge."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.4:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            _fill_map(rng, getattr(message, field.name), field, depth)
        elif field.is_repeated:
            _fill_repeated(rng, getattr(message, field.name), field, depth)
        elif field.message_type is not None:
            if depth < 4:
                getattr(message, field.name).SetInParent()
                fill(rng, getattr(message, field.name), depth + 1)
        else:
            setattr(message, field.name, value(rng, field))


def _fill_repeated(rng: random.Random, container: Any, field: Any, depth: int) -> None:
    count = rng.choice((0, 1, 2, 17, 300, 5000))
    if field.message_type is None:
        container.extend([value(rng, field)] * count)
    elif depth < 4:
        for _ in range(min(count, 300)):
            fill(rng, container.add(), depth + 3)


def _fill_map(rng: random.Random, container: Any, field: Any, depth: int) -> None:
    key, of = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
    for _ in range(rng.choice((1, 3, 100))):
        name = value(rng, key)
        if of.message_type is None:
            container[name] = value(rng, of)
        else:
            fill(rng, container[name], depth + 1)


def value(rng: random.Random, field: Any) -> Any:
    """Of a scalar field."""
    kind = field.cpp_type
    if kind in _BITS:
        low, high = _BITS[kind]
        return min(high, max(low, rng.choice(EDGES)))
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return rng.choice(DOUBLES)
    text = rng.choice(TEXTS)
    return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
