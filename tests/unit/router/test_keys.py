"""The file of API keys: what it holds, who is let in, and that it may change under a running router."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ellm.deploy.cli import main
from ellm.router.keys import ApiKey, KeyRing, new_key, read_keys, write_keys
from ellm.worker.api.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_key_is_known_again_and_the_file_does_not_hold_it(path: Path) -> None:
    stored, plain = new_key(ApiKey("", "alice", 2.5, 6000.0, -3))
    write_keys(path, [stored])
    ring = KeyRing((), path)
    assert ring.find(plain, 0.0) == ApiKey(stored.key.id, "alice", 2.5, 6000.0, -3)
    assert plain.rpartition("-")[2] not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    flipped = plain[:-1] + ("A" if plain[-1] != "A" else "B")
    for wrong in ("", "ellm-", plain + "x", flipped, plain.replace(stored.key.id, "00000000")):
        assert ring.find(wrong, 0.0) is None


def test_the_file_is_read_again_when_it_changes(path: Path) -> None:
    write_keys(path, [])
    ring = KeyRing((), path)
    assert ring.needed  # a file without keys lets nobody in
    stored, plain = new_key(ApiKey(""))
    write_keys(path, [stored])
    assert ring.find(plain, 2.0) is not None
    path.write_text("{broken")
    assert ring.find(plain, 4.0) is not None  # the last good one stays
    path.unlink()
    assert ring.find(plain, 6.0) is not None
    write_keys(path, [])
    assert ring.find(plain, 8.0) is None


def test_plain_keys_and_those_of_a_file_live_together(path: Path) -> None:
    stored, plain = new_key(ApiKey(""))
    write_keys(path, [stored])
    ring = KeyRing(("first", "second"), path)
    owners = {ring.find(key, 0.0) for key in ("first", "second", plain)}
    assert len(owners) == 3
    assert None not in owners
    assert not KeyRing().needed


@pytest.mark.parametrize(
    "text", ["", "[]", '{"keys": [{}]}', '{"keys": 3}', '{"keys": [{"id": "a", "salt": "x"}]}']
)
def test_a_file_that_is_none_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"keys\.json"):
        KeyRing((), path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_keys(path.parent / "absent")


def test_the_command_makes_lists_and_revokes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ["--file", str(path)]
    assert main(["keys", "add", "--name", "bob", "--requests-per-s", "3", *file]) == 0
    plain = capsys.readouterr().out.strip()
    ring = KeyRing((), path)
    owner = ring.find(plain, 0.0)
    assert owner is not None
    assert (owner.name, owner.requests_per_s) == ("bob", 3.0)
    assert main(["keys", "add", *file]) == 0
    assert main(["keys", "list", *file]) == 0
    listed = capsys.readouterr().out
    assert owner.id in listed
    assert plain not in listed
    assert main(["keys", "revoke", owner.id, *file]) == 0
    assert KeyRing((), path).find(plain, 0.0) is None
    assert len(json.loads(path.read_text())["keys"]) == 1
    assert main(["keys", "revoke", owner.id, *file]) == 2
    assert main(["keys", "add", "--requests-per-s", "-1", *file]) == 2
    assert os.listdir(path.parent) == ["keys.json"]
