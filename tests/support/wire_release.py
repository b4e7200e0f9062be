"""What a release says on the wire: the fields of its messages in their order, and one of each as bytes.

Run as a script at a release, it writes the file that later versions are held to:

    .venv/bin/python tests/support/wire_release.py 1.0 > tests/unit/worker/wire/1.0.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

import msgpack

from ellm.worker.api import wire
from ellm.worker.api.output import SequenceOutput, TokenLogprobs
from ellm.worker.api.report import WorkerInfo, WorkerReport
from ellm.worker.api.request import EngineRequest, SamplingParams

CLASSES = (EngineRequest, SamplingParams, SequenceOutput, TokenLogprobs, WorkerReport, WorkerInfo)


# How a field's type begins or what it holds -> a value made of the field's place. The first that fits.
MAKERS: tuple[tuple[str, Callable[[int], Any]], ...] = (
    ("tuple[tuple[str, float, int]", lambda place: ((f"event{place}", place + 0.5, place),)),
    ("tuple[tuple[str, int]", lambda place: ((f"name{place}", place),)),
    ("tuple[tuple[int, float]", lambda place: ((place, place + 0.5),)),
    ("tuple[float, float, float]", lambda place: (place + 0.25, place + 0.5, place + 0.75)),
    ("tuple[str, str]", lambda place: (f"code{place}", f"message{place}")),
    ("tuple[int", lambda place: (place, place + 1)),
    ("bytes", lambda place: bytes([place, 255])),
    ("bool", lambda place: True),
    ("float", lambda place: place + 0.5),
    ("int", lambda place: place),
    ("str", lambda place: f"text{place}"),
)


def sample(cls: type[Any], **values: Any) -> Any:
    """An object of `cls` in which every field has a value of its own: its place in the class, so that two
    that are exchanged are seen."""
    made: dict[str, Any] = {}
    for place, field in enumerate(fields(cls)):
        if field.name in values:
            made[field.name] = values[field.name]
            continue
        makers = [make for kind, make in MAKERS if kind in str(field.type)]
        assert makers, f"{cls.__name__}.{field.name}: a kind of field to be thought of"
        made[field.name] = makers[0](place)
    return cls(**made)


def samples() -> dict[str, Any]:
    """Name -> object: what the messages of `messages` hold."""
    score = sample(TokenLogprobs)
    return {
        "request": sample(EngineRequest, sampling=sample(SamplingParams)),
        "output": sample(
            SequenceOutput, finish_reason="length", logprobs=(score, score), prompt_logprobs=(None, score)
        ),
        "token": SequenceOutput("text0", 1, 2, (3,)),
        "report": sample(WorkerReport, state="draining"),
        "info": sample(WorkerInfo),
    }


def messages() -> dict[str, wire.Message]:
    """Kind -> a message of it."""
    objects = samples()
    return {
        "hello": wire.hello("router", b"secret"),
        "open": wire.open_stream("router"),
        "submit": wire.submit("router", 7, [objects["request"]]),
        "abort": wire.abort("router", 8, [("text0", 1)]),
        "step": wire.step("epoch", 9, [objects["output"], objects["token"]], objects["report"]),
        "info": wire.pack_info(objects["info"]),
    }


def schema(classes: Iterable[type[Any]] = CLASSES) -> dict[str, list[str]]:
    """Class -> its fields in order."""
    return {cls.__name__: [field.name for field in fields(cls)] for cls in classes}


def write_release(
    name: str, version: int, what: dict[str, list[str]], packed: Mapping[str, tuple[Any, ...]]
) -> None:
    """To standard output: the schema `what`, and the messages as bytes."""
    release = {
        "release": name,
        "version": version,
        "schema": what,
        "messages": {kind: msgpack.packb(message).hex() for kind, message in packed.items()},
    }
    sys.stdout.write(json.dumps(release, indent=1) + "\n")


if __name__ == "__main__":
    write_release(sys.argv[1], wire.VERSION, schema(), messages())
