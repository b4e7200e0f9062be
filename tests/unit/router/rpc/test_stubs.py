"""The stubs that are committed are those of the protos."""

from __future__ import annotations

from ellm.router.rpc import generate


def test_the_committed_stubs_are_what_the_protos_give() -> None:
    made = generate.stubs()
    assert len(made) == 3 * len(generate.PROTOS)
    there = {path.name: path.read_text() for path in generate.FOLDER.glob("*_pb2*.py*")}
    assert there.keys() == made.keys()
    assert [name for name in made if there[name] != made[name]] == []


def test_every_proto_is_in_the_list() -> None:
    assert {path.stem for path in generate.FOLDER.glob("*.proto")} == set(generate.PROTOS)
