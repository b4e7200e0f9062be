"""A router beside a controller of another release: notes and guidance that releases have sent are understood,
and what is sent now begins with what they would have sent."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import msgpack
import pytest
from support.controller_release import CLASSES, messages, samples, schema

from ellm.cluster.api import wire
from ellm.worker.api.wire import Message

RELEASES = sorted(Path(__file__).with_name("wire").glob("*.json"))
# A file is written once, at its release, and never again with the code.
SHA256 = {"0.1": "5cc8e3fee6fff7e2988c9764fcc1ab22b7b4fc4cb654817882b0cdcf1dd17277"}
NESTED = {"note": {2: "TenantUse"}, "guidance": {4: "WorkerGuidance", 5: "TenantBudget"}}  # place -> class
WHOLE = {"note": "RouterNote", "guidance": "Guidance"}


@pytest.fixture(params=RELEASES, ids=lambda path: path.stem)
def release(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request.param.read_text())
    return found


def said(release: dict[str, Any], kind: str) -> Message:
    message: Message = msgpack.unpackb(bytes.fromhex(release["messages"][kind]), use_list=False)
    return message


def test_what_releases_said_is_kept_as_it_was() -> None:
    assert {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in RELEASES} == SHA256


def test_fields_are_only_ever_added_at_the_end_and_have_defaults(release: dict[str, Any]) -> None:
    now = schema()
    assert release["schema"].keys() == now.keys()
    for cls in CLASSES:
        then = release["schema"][cls.__name__]
        assert now[cls.__name__][: len(then)] == then
        for field in fields(cls)[len(then) :]:
            assert field.default is not MISSING or field.default_factory is not MISSING, field.name


def test_what_a_release_says_is_understood(release: dict[str, Any]) -> None:
    assert abs(release["version"] - wire.VERSION) <= 1
    read = {
        "note": wire.unpack_note(said(release, "note")),
        "guidance": wire.unpack_guidance(said(release, "guidance")),
    }
    for kind, expected in samples().items():
        for name in release["schema"][WHOLE[kind]]:
            theirs, ours = getattr(read[kind], name), getattr(expected, name)
            if name not in ("uses", "workers", "budgets"):
                assert theirs == ours, name
                continue
            assert len(theirs) == len(ours) > 0
            for one, other in zip(theirs, ours, strict=True):
                for part in release["schema"][type(one).__name__]:
                    assert getattr(one, part) == getattr(other, part), part


def test_what_is_said_now_begins_with_what_the_release_would_have_said(release: dict[str, Any]) -> None:
    for kind, message in messages().items():
        former, size = said(release, kind), len(release["schema"][WHOLE[kind]])
        now = list(message[2 : 2 + size])
        for place, name in NESTED[kind].items():
            now[place] = tuple(each[: len(release["schema"][name])] for each in now[place])
        assert tuple(now) == former[2:]
