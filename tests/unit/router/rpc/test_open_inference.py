"""The Open Inference Protocol: what its methods say, and what ModelInfer takes and gives in both forms."""

from __future__ import annotations

import struct
from typing import Any

import grpc
import pytest
from support.router_server import MODEL, RouterServer
from support.rpc import Client, assert_nothing_left, refused, rpc_client

from ellm.router.rpc import open_inference_pb2 as oip

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def infer(*texts: bytes, shape: list[int] | None = None, raw: bool = False, **params: Any) -> Any:
    message = oip.ModelInferRequest(model_name=MODEL, id="id-1")
    tensor = message.inputs.add(name="text_input", datatype="BYTES", shape=shape or [len(texts)])
    if raw:
        message.raw_input_contents.append(b"".join(struct.pack("<I", len(t)) + t for t in texts))
    else:
        tensor.contents.bytes_contents.extend(texts)
    for name, value in {"max_tokens": 3, "temperature": 0.0, **params}.items():
        kind = {bool: "bool", int: "int64", str: "string", float: "double"}[type(value)]
        setattr(message.parameters[name], f"{kind}_param", value)
    return message


def output(response: oip.ModelInferResponse, name: str) -> Any:
    index = [tensor.name for tensor in response.outputs].index(name)
    tensor = response.outputs[index]
    if tensor.datatype == "INT64":
        if not response.raw_output_contents:
            return list(tensor.contents.int64_contents)
        data = response.raw_output_contents[index]
        return list(struct.unpack(f"<{len(data) // 8}q", data))
    if not response.raw_output_contents:
        return list(tensor.contents.bytes_contents)
    data, found = response.raw_output_contents[index], []
    while data:
        (length,) = struct.unpack_from("<I", data)
        found.append(data[4 : 4 + length])
        data = data[4 + length :]
    return found


@pytest.mark.parametrize("raw", [False, True])
def test_texts_are_completed(rpc_server: RouterServer, rpc: Client, raw: bool) -> None:
    texts = (b"one and two and three", "zwölf größere Brücken".encode())
    response = rpc.open.ModelInfer(infer(*texts, raw=raw), timeout=60)
    with rpc_server.client() as client:
        body = {"prompt": [text.decode() for text in texts], "max_tokens": 3, "temperature": 0}
        told = client.post("/v1/completions", json=body).json()["choices"]
    assert (response.model_name, response.model_version, response.id) == (MODEL, "1", "id-1")
    assert [list(tensor.shape) for tensor in response.outputs] == [[2]] * 3
    assert output(response, "text_output") == [one["text"].encode() for one in told]
    assert output(response, "finish_reason") == [one["finish_reason"].encode() for one in told]
    assert output(response, "num_output_tokens") == [3, 3]


def test_the_form_of_a_column_and_n_choices(rpc: Client) -> None:
    response = rpc.open.ModelInfer(infer(b"a b c", b"d e f", shape=[2, 1], n=2), timeout=60)
    assert [list(tensor.shape) for tensor in response.outputs] == [[2, 2]] * 3
    assert len(output(response, "text_output")) == 4


def test_only_what_is_wanted(rpc: Client) -> None:
    message = infer(b"a b c")
    message.outputs.add(name="text_output")
    assert [tensor.name for tensor in rpc.open.ModelInfer(message, timeout=60).outputs] == ["text_output"]


def test_parameters_of_every_type(rpc: Client) -> None:
    message = infer(b"a b c d e", max_tokens=40, stop="d", ignore_eos=True, temperature=1, seed=7, top_k=1)
    message.parameters["min_tokens"].uint64_param = 1
    response = rpc.open.ModelInfer(message, timeout=60)
    assert output(response, "finish_reason") == [b"stop"]


def changed(**fields: Any) -> Any:
    message = infer(b"x")
    for name, value in fields.items():
        setattr(message.inputs[0], name, value)
    return message


def with_parameter(**params: Any) -> Any:
    return infer(b"x", **params)


BAD = {
    "no input": (oip.ModelInferRequest(model_name=MODEL), "inputs"),
    "another input": (changed(name="image"), "inputs"),
    "another datatype": (changed(datatype="FP32"), "inputs[0].datatype"),
    "no shape": (infer(b"x", shape=[0]), "inputs[0].shape"),
    "a negative shape": (infer(b"x", shape=[-1]), "inputs[0].shape"),
    "a huge shape": (infer(b"x", shape=[2**62]), "inputs[0].shape"),
    "too many dimensions": (infer(b"x", shape=[1, 1, 1]), "inputs[0].shape"),
    "a wide shape": (infer(b"x", b"y", shape=[1, 2]), "inputs[0].shape"),
    "too many texts": (infer(*[b"x"] * 257), "inputs[0].shape"),
    "fewer than said": (infer(b"x", shape=[2]), "inputs[0].contents"),
    "more than said": (infer(b"x", b"y", shape=[1]), "inputs[0].contents"),
    "raw, fewer than said": (infer(b"x", shape=[2], raw=True), "raw_input_contents"),
    "raw, more than said": (infer(b"x", b"y", shape=[1], raw=True), "raw_input_contents"),
    "no text": (infer(b"\xff\xfe"), "text_input"),
    "too long": (infer(b"word " * 3000), "text_input"),
    "out of bounds": (with_parameter(temperature=9.0), "temperature"),
    "of another type": (with_parameter(max_tokens="3"), "max_tokens"),
    "unknown": (with_parameter(max_new_tokens=3), "max_new_tokens"),
    "streamed": (with_parameter(stream=True), "stream"),
    "echoed": (with_parameter(echo=True), "echo"),
    "a prompt": (with_parameter(prompt="x"), "prompt"),
    "many": (with_parameter(**{f"p{i}": 1 for i in range(70)}), "parameters"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_named(rpc: Client, name: str) -> None:
    message, param = BAD[name]
    refused(lambda: rpc.open.ModelInfer(message, timeout=60), INVALID, param)


@pytest.mark.parametrize(
    "raw",
    [[b"\xff\xff\xff\xff"], [b"\x01\x00\x00"], [b"\x05\x00\x00\x00ab"], [b"\x00" * 5], [b"", b""], [b""]],
)
def test_broken_raw_contents(rpc: Client, raw: list[bytes]) -> None:
    message = infer(b"x", raw=True)
    message.raw_input_contents[:] = raw
    refused(lambda: rpc.open.ModelInfer(message, timeout=60), INVALID, "raw_input_contents")


def test_both_forms_at_once(rpc: Client) -> None:
    message = infer(b"x")
    message.raw_input_contents.append(b"\x01\x00\x00\x00x")
    refused(lambda: rpc.open.ModelInfer(message, timeout=60), INVALID, "raw_input_contents")


def test_unknown_names(rpc: Client) -> None:
    message = infer(b"x")
    message.outputs.add(name="embedding")
    refused(lambda: rpc.open.ModelInfer(message, timeout=60), INVALID, "outputs[0].name")
    message.outputs[0].name = "text_output"
    message.outputs[0].parameters["binary_data"].bool_param = True
    refused(lambda: rpc.open.ModelInfer(message, timeout=60), INVALID, "outputs[0].parameters")
    missing = grpc.StatusCode.NOT_FOUND
    refused(lambda: rpc.open.ModelInfer(oip.ModelInferRequest(model_name="other"), timeout=60), missing)
    ask = oip.ModelMetadataRequest(name=MODEL, version="2")
    refused(lambda: rpc.open.ModelMetadata(ask, timeout=60), missing, "version")
    refused(lambda: rpc.open.ModelReady(oip.ModelReadyRequest(name="other"), timeout=60), missing)


def test_what_it_says_of_itself(rpc_server: RouterServer, rpc: Client) -> None:
    assert rpc.open.ServerLive(oip.ServerLiveRequest(), timeout=60).live
    assert rpc.open.ServerReady(oip.ServerReadyRequest(), timeout=60).ready
    assert rpc.open.ModelReady(oip.ModelReadyRequest(name=MODEL, version="1"), timeout=60).ready
    server = rpc.open.ServerMetadata(oip.ServerMetadataRequest(), timeout=60)
    assert server.name == "ellm"
    model = rpc.open.ModelMetadata(oip.ModelMetadataRequest(name=MODEL), timeout=60)
    assert (model.name, list(model.versions), model.platform) == (MODEL, ["1"], "ellm")
    assert [(t.name, t.datatype, list(t.shape)) for t in model.inputs] == [("text_input", "BYTES", [-1])]
    answer = rpc.open.ModelInfer(infer(b"a b"), timeout=60)
    told = {tensor.name: tensor.datatype for tensor in model.outputs}
    assert told == {tensor.name: tensor.datatype for tensor in answer.outputs}
    assert_nothing_left(rpc_server)


def test_a_model_that_cannot_be_served() -> None:
    with RouterServer(broken={"bad": "it has no tokenizer"}, grpc=True) as server, rpc_client(server) as rpc:
        assert not rpc.open.ModelReady(oip.ModelReadyRequest(name="bad"), timeout=60).ready
        message = infer(b"x")
        message.model_name = "bad"
        refused(lambda: rpc.open.ModelInfer(message, timeout=60), grpc.StatusCode.UNAVAILABLE)
