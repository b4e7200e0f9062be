"""The Open Inference Protocol's tensors, as far as text needs them: BYTES in, BYTES and INT64 out.

A tensor's elements come in its contents or raw (each with its length before it, 4 bytes, little-endian), and
go back in the form in which they came. Counts are checked before anything is copied.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ellm.router.rpc.open_inference_pb2 import ModelInferRequest, ModelInferResponse
from ellm.worker.api.errors import InvalidRequest

TEXT_INPUT = "text_input"


def read_texts(request: ModelInferRequest, most: int) -> list[str]:
    """The elements of the one input there may be, at most so many. Raises InvalidRequest."""
    if len(request.inputs) != 1 or request.inputs[0].name != TEXT_INPUT:
        raise InvalidRequest(f"inputs: one tensor, {TEXT_INPUT}", param="inputs")
    tensor = request.inputs[0]
    if tensor.datatype != "BYTES":
        raise InvalidRequest(f"{TEXT_INPUT}: its datatype is BYTES", param="inputs[0].datatype")
    if tensor.parameters:
        raise InvalidRequest(f"{TEXT_INPUT}: a tensor has no parameters here", param="inputs[0].parameters")
    count = _count(tensor.shape)
    if not 1 <= count <= most:
        raise InvalidRequest(
            f"{TEXT_INPUT}: shape [N] or [N, 1], N from 1 to {most}", param="inputs[0].shape"
        )
    elements = _raw(request, count) if request.raw_input_contents else _contents(tensor, count)
    return [_text(element) for element in elements]


def _count(shape: Sequence[int]) -> int:
    """Of elements; 0 for a shape that no list of texts has."""
    if len(shape) == 2 and shape[1] != 1:
        return 0
    return shape[0] if 1 <= len(shape) <= 2 else 0


def _contents(tensor: ModelInferRequest.InferInputTensor, count: int) -> Sequence[bytes]:
    elements: Sequence[bytes] = tensor.contents.bytes_contents
    if len(elements) != count:
        raise InvalidRequest(
            f"{TEXT_INPUT}: {len(elements)} elements, and its shape says {count}", param="inputs[0].contents"
        )
    return elements


def _raw(request: ModelInferRequest, count: int) -> list[bytes]:
    field = "raw_input_contents"
    if len(request.raw_input_contents) != 1 or request.inputs[0].HasField("contents"):
        raise InvalidRequest(f"{field}: one for each input, and then no contents", param=field)
    raw, at = request.raw_input_contents[0], 0
    elements: list[bytes] = []
    while at + 4 <= len(raw) and len(elements) < count:
        start = at + 4
        at = start + int.from_bytes(raw[at:start], "little")
        elements.append(raw[start:at])
    if at != len(raw) or len(elements) != count:
        raise InvalidRequest(f"{field}: not {count} elements with their lengths", param=field)
    return elements


def _text(element: bytes) -> str:
    try:
        return element.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{TEXT_INPUT}: not valid UTF-8", param=TEXT_INPUT) from None


def add_texts(
    response: ModelInferResponse, name: str, shape: Sequence[int], texts: Sequence[str], raw: bool
) -> None:
    """A BYTES tensor."""
    tensor = response.outputs.add(name=name, datatype="BYTES", shape=shape)
    encoded = [text.encode() for text in texts]
    if raw:
        response.raw_output_contents.append(b"".join(struct.pack("<I", len(e)) + e for e in encoded))
    else:
        tensor.contents.bytes_contents.extend(encoded)


def add_numbers(
    response: ModelInferResponse, name: str, shape: Sequence[int], numbers: Sequence[int], raw: bool
) -> None:
    """An INT64 tensor."""
    tensor = response.outputs.add(name=name, datatype="INT64", shape=shape)
    if raw:
        response.raw_output_contents.append(struct.pack(f"<{len(numbers)}q", *numbers))
    else:
        tensor.contents.int64_contents.extend(numbers)
