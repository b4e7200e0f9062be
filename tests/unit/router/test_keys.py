"""The file of API keys: what it holds, who is let in, and that it may change under a running router."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ellm.deploy.cli import main
from ellm.deploy.config import load
from ellm.router import keys, metrics_page
from ellm.router.access import Access
from ellm.router.key_ring import KeyRing
from ellm.router.keys import ApiKey, new_key, read_keys, write_keys
from ellm.router.metrics_declared import DECLARED
from ellm.worker.api.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_key_is_known_again_and_the_file_does_not_hold_it(path: Path) -> None:
    stored, plain = new_key(ApiKey("", "alice", 2.5, 6000.0, -3))
    write_keys(path, [stored])
    ring = KeyRing((), path)
    assert ring.find(plain, 0.0) == ApiKey(stored.key.id, "alice", 2.5, 6000.0, -3)
    assert plain.split("-", 2)[2] not in path.read_text()
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


def test_a_file_that_breaks_changes_nothing_and_is_told_of_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored, plain = new_key(ApiKey(""))
    write_keys(path, [stored])
    ring = KeyRing((), path)
    good = path.read_text()
    path.write_text(good[:40])  # as whoever writes it in two parts
    for now in (2.0, 4.0, 6.0):
        assert ring.find(plain, now) is not None
    assert len([r for r in caplog.records if "stay as they were" in r.message]) == 1
    assert f"{path} line" in caplog.text
    assert samples(ring)["ellm_api_key_file_broken"] == 1.0
    assert samples(ring)["ellm_api_key_reloads_total/failed"] == 1.0
    at = path.stat()
    path.write_text("x" * 40)
    os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns))  # the same size and time: nothing tells them apart
    write_keys(path, [])
    assert ring.find(plain, 8.0) is None
    assert (ring.broken, samples(ring)["ellm_api_keys"]) == ("", 0.0)
    assert samples(ring)["ellm_api_key_reloads_total/loaded"] == 1.0
    assert samples(ring)["ellm_api_key_file_broken"] == 0.0


def test_a_broken_file_is_read_again_though_it_looks_the_same(path: Path) -> None:
    """Its time is as coarse as the kernel's tick: the end of a write may leave no trace in it."""
    stored, plain = new_key(ApiKey(""))
    write_keys(path, [])
    ring = KeyRing((), path)
    write_keys(path, [stored])
    good = path.read_text()
    path.write_text(good.replace('"hash"', '"hsah"'))
    at = path.stat()
    assert ring.find(plain, 2.0) is None
    path.write_text(good)
    os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns))
    assert ring.find(plain, 4.0) is not None


def samples(ring: KeyRing) -> dict[str, float]:
    page = metrics_page.families(DECLARED, [], dict([*ring.series(), *ring.gauges("r")]))
    return {
        "/".join([sample.name, *(v for k, v in sample.labels.items() if k != "router")]): sample.value
        for family in page
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("hash", "ab" * 32 + "\n", 24),
        ("salt", "a\nb", 23),
        ("id", "12345678\n", 16),
        ("name", "bob\nroot", 17),
        ("cache_salt", "a/b", 22),
        ("models", [], 21),
        ("models", "all", 21),
        ("modells", ["a"], 25),
        ("priority", 1.5, 20),
    ],
)
def test_a_bad_field_is_named_with_its_line(path: Path, field: str, value: object, line: int) -> None:
    write_keys(path, [new_key(ApiKey("", str(i)))[0] for i in range(2)])
    data = json.loads(path.read_text())
    data["keys"][1][field] = value
    path.write_text(json.dumps(data, indent=1))
    with pytest.raises(ConfigError, match=rf"keys\.json line {line}: {field}: ") as raised:
        read_keys(path)
    assert "ab" * 32 not in raised.value.message


def test_a_line_break_within_a_text_is_named_with_its_line(path: Path) -> None:
    write_keys(path, [new_key(ApiKey("", "bob"))[0]])
    path.write_text(path.read_text().replace("bob", "bo\nb"))
    with pytest.raises(ConfigError, match="line 6: not JSON: Invalid control character"):
        read_keys(path)
    write_keys(path, [new_key(ApiKey(""))[0]] * 2)
    with pytest.raises(ConfigError, match="line 16: id: is there twice"):
        read_keys(path)


@pytest.mark.parametrize("key", ["first\nsecond", "first\n", "", "a b", "schlüssel", "x" * 513])
def test_a_key_of_the_config_that_nobody_can_send_is_refused(key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        KeyRing(["fine", key])
    assert raised.value.message.startswith("router.api_keys[1] ")
    assert not key or key not in raised.value.message
    assert ("line break after 5" in raised.value.message) == ("\n" in key)
    with pytest.raises(ConfigError, match=r"router\.admin_key"):
        Access(KeyRing(), key)
    with pytest.raises(ConfigError, match=r"router\.api_keys\[1\]"):
        load(environ={}, settings=[f"router.api_keys={json.dumps(['fine', key])}"])


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
    assert main(["keys", "change", owner.id, *file]) == 2
    assert main(["keys", "add", "--requests-per-s", "-1", *file]) == 2
    assert os.listdir(path.parent) == ["keys.json"]


def test_the_command_says_which_models_and_whose_cache(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ["--file", str(path)]
    assert main(["keys", "add", "--model", "small", "--model", "large", "--cache-salt", "team", *file]) == 0
    plain = capsys.readouterr().out.strip()
    ring = KeyRing((), path)
    key = ring.find(plain, 0.0)
    assert key is not None
    assert (key.models, key.cache_salt, key.salt) == (("small", "large"), "team", "+team")
    assert key.may_use("small")
    assert not key.may_use("other")
    assert main(["keys", "list", *file]) == 0
    listed = capsys.readouterr().out
    assert "small, large" in listed
    assert "team" in listed
    change = ["keys", "change", key.id, *file]
    assert main([*change, "--model", "none", "--priority", "4", "--cache-salt", "none"]) == 0
    changed = ring.find(plain, 2.0)
    assert changed == ApiKey(key.id, priority=4)
    assert changed is not None
    assert changed.salt == key.id
    assert main([*change, "--priority", "none", "--name", "bob"]) == 0
    assert ring.find(plain, 4.0) == ApiKey(key.id, "bob")
    assert main([*change, "--cache-salt", "a/b"]) == 2
    assert main([*change, "--name", "a\nb"]) == 2
    assert ring.find(plain, 6.0) == ApiKey(key.id, "bob")


def test_a_file_of_an_older_release_is_read(path: Path) -> None:
    stored, plain = new_key(ApiKey("", "alice", 2.0, 60.0, 1))
    write_keys(path, [stored])
    data = json.loads(path.read_text())
    for name in ("models", "cache_salt"):
        del data["keys"][0][name]
    path.write_text(json.dumps(data))
    assert KeyRing((), path).find(plain, 0.0) == stored.key
    path.write_text(json.dumps({**data, "version": 2}))
    with pytest.raises(ConfigError, match="version 2"):
        read_keys(path)
