"""A worker or router of another release: what releases have said on the wire is still understood, and what is
said now could be read by them, who ignore what they do not know."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import msgpack
import pytest
from support.wire_release import CLASSES, messages, sample, samples, schema

from ellm.worker.api import wire
from ellm.worker.api.output import SequenceOutput, TokenLogprobs
from ellm.worker.api.request import EngineRequest, SamplingParams

RELEASES = sorted(Path(__file__).with_name("wire").glob("*.json"))
# What was said cannot be unsaid: a file is written once, at its release, and never again with the code.
SHA256 = {"0.1": "9ac05232c27a39ef92913dc4e68eb4151fd41b34cc6a4265232910958c5034cb"}
NOT_UNDERSTOOD: set[str] = set()  # releases whose version is too far back


@pytest.fixture(params=RELEASES, ids=lambda path: path.stem)
def release(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request.param.read_text())
    return found


def said(release: dict[str, Any], kind: str) -> wire.Message:
    message: wire.Message = msgpack.unpackb(bytes.fromhex(release["messages"][kind]), use_list=False)
    return message


def as_then(obj: Any, release: dict[str, Any]) -> Any:
    """`obj` with nothing but the defaults in fields that the release did not have."""
    known = set(release["schema"][type(obj).__name__])
    values = {}
    for field in fields(obj):
        value = getattr(obj, field.name)
        if field.name not in known:
            value = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]
        elif isinstance(value, SamplingParams):
            value = as_then(value, release)
        values[field.name] = value
    return type(obj)(**values)


def test_what_releases_said_is_kept_as_it_was() -> None:
    assert {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in RELEASES} == SHA256


def test_a_release_that_is_not_understood_is_named(release: dict[str, Any]) -> None:
    too_far = abs(release["version"] - wire.VERSION) > 1
    assert too_far == (release["release"] in NOT_UNDERSTOOD)
    if too_far:
        with pytest.raises(wire.WireError):
            wire.check(said(release, "step"), "step")


def test_fields_are_only_ever_added_at_the_end(release: dict[str, Any]) -> None:
    now = schema()
    assert release["schema"].keys() <= now.keys()
    for name, names in release["schema"].items():
        assert now[name][: len(names)] == names, name
    for cls in CLASSES:
        for field in fields(cls)[len(release["schema"][cls.__name__]) :]:
            has_default = field.default is not MISSING or field.default_factory is not MISSING
            assert has_default, f"{cls.__name__}.{field.name}: the release does not send it"


def test_what_a_release_says_is_understood(release: dict[str, Any]) -> None:
    if release["release"] in NOT_UNDERSTOOD:
        return  # which the test above has seen
    expected = {name: as_then(obj, release) for name, obj in samples().items()}
    router_id, secret = wire.check(said(release, "hello"), "hello")[:2]
    assert (router_id, secret) == ("router", b"secret")
    assert wire.check(said(release, "open"), "open")[0] == "router"
    router_id, seq, requests = wire.check(said(release, "submit"), "submit")[:3]
    assert (router_id, seq) == ("router", 7)
    assert [wire.unpack_request(r) for r in requests] == [expected["request"]]
    assert wire.check(said(release, "abort"), "abort")[:3] == ("router", 8, (("text0", 1),))
    epoch, seq, outputs, report = wire.check(said(release, "step"), "step")[:4]
    assert (epoch, seq) == ("epoch", 9)
    assert [wire.unpack_output(o) for o in outputs] == [expected["output"], expected["token"]]
    assert wire.unpack_report(report) == expected["report"]
    assert wire.unpack_info(said(release, "info")) == expected["info"]


def test_what_is_said_now_begins_with_what_the_release_would_have_said(release: dict[str, Any]) -> None:
    now = messages()
    sizes = {name: len(names) for name, names in release["schema"].items()}
    for kind in ("hello", "open", "abort"):
        assert msgpack.packb(now[kind]).hex() == release["messages"][kind]
    request, former = now["submit"][4][0], said(release, "submit")[4][0]
    assert request[: sizes["EngineRequest"]] == (*former[:2], request[2], *former[3:])
    assert request[2][: sizes["SamplingParams"]] == former[2]
    output, former = now["step"][4][0], said(release, "step")[4][0]
    assert output[: sizes["SequenceOutput"]] == former
    assert now["step"][4][1] == said(release, "step")[4][1]
    assert now["step"][5][: sizes["WorkerReport"]] == said(release, "step")[5]
    assert now["info"][: sizes["WorkerInfo"]] == said(release, "info")


def test_a_reader_of_this_release_ignores_what_a_later_one_adds() -> None:
    expected = samples()
    request = wire.pack_request(expected["request"])
    request = (*request[:2], (*request[2], "new"), *request[3:], "new")
    assert wire.unpack_request(request) == expected["request"]
    assert wire.unpack_output((*wire.pack_output(expected["output"]), "new")) == expected["output"]
    assert wire.unpack_report((*wire.pack_report(expected["report"]), "new")) == expected["report"]
    assert wire.unpack_info((*wire.pack_info(expected["info"]), "new")) == expected["info"]
    later = (wire.VERSION + 1, "step", "epoch", 1, [], None, "new")
    assert wire.check(later, "step")[:4] == ("epoch", 1, [], None)
    with pytest.raises(wire.WireError):
        wire.check((wire.VERSION + 2, "step"), "step")


def test_every_field_of_the_samples_differs_from_its_neighbours() -> None:
    """Else two that are exchanged would go unnoticed."""
    for cls in (TokenLogprobs, SamplingParams):
        values = [getattr(sample(cls), field.name) for field in fields(cls)]
        numbers = [v for v in values if type(v) in (int, float)]
        assert len(set(numbers)) == len(numbers)
    assert isinstance(samples()["request"], EngineRequest)
    assert isinstance(samples()["output"], SequenceOutput)
