"""The file of API keys: what it holds, who is let in, and that it may change under a running router."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ellm.deploy.cli import main
from ellm.router import keys
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


@pytest.mark.parametrize(
    "limits",
    [
        {"requests_per_s": "5"},
        {"requests_per_s": True},
        {"requests_per_s": -1},
        {"requests_per_s": float("nan")},
        {"tokens_per_min": float("inf")},
        {"tokens_per_min": [1]},
        {"priority": "1"},
        {"priority": 1.5},
        {"priority": 2**31},
        {"name": 7},
        {"id": 7},
    ],
)
def test_a_limit_of_another_type_or_out_of_bounds_is_refused(path: Path, limits: dict[str, object]) -> None:
    write_keys(path, [new_key(ApiKey("", "alice", 5, 60.5, -3))[0]])
    assert read_keys(path)[0].key.requests_per_s == 5
    data = json.loads(path.read_text())
    data["keys"][0].update(limits)
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError):
        read_keys(path)


def test_keys_that_are_made_at_once_are_all_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = keys.read_keys

    def slowly(path: Path) -> list[keys.StoredKey]:
        found = read(path)
        time.sleep(0.02)
        return found

    write_keys(path, [])
    monkeypatch.setattr(keys, "read_keys", slowly)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(main, [["keys", "add", "--file", str(path)]] * 8)) == {0}
    assert len(read(path)) == 8
    assert main(["keys", "add", "--file", str(path.parent / "absent" / "keys.json")]) == 2
    assert main(["keys", "add", "--requests-per-s", "inf", "--file", str(path)]) == 2


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
