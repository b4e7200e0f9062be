"""API keys: who may call, how much of it, and how urgent it is. From the config, and from a file of hashes.

A key of the file is `ellm-ID-SECRET`: the id finds its entry, the secret is 32 random bytes, of which it
holds the salted SHA-256 (a slow hash is for secrets that can be guessed). The file is read again when it
changes; one that cannot be read then is reported and the keys known so far stay. Keys of the config have no
limits.
"""

from __future__ import annotations

import fcntl
import hmac
import json
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from types import UnionType
from typing import Any

from ellm.worker.api.errors import ConfigError

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between looks at the file
MAX_RATE = 1e12
PRIORITIES = (-(2**31 - 1), 2**31 - 1)
_KEY = re.compile(r"ellm-([0-9a-f]{8})-([A-Za-z0-9_-]{43})")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What a key may do. `id` stands for it everywhere: in salts, budgets and metrics."""

    id: str
    name: str = ""
    requests_per_s: float | None = None  # over the whole cluster; None: no limit
    tokens_per_min: float | None = None  # prompt and output together
    priority: int | None = None  # of its requests, and the best they may ask for; lower runs first; None: any


@dataclass(frozen=True, slots=True)
class StoredKey:
    """An entry of the file."""

    key: ApiKey
    salt: str  # hex
    hash: str  # hex


def new_key(key: ApiKey) -> tuple[StoredKey, str]:
    """An entry with a new id, and the key itself, which is kept nowhere."""
    ident, secret, salt = secrets.token_hex(4), secrets.token_urlsafe(32), secrets.token_bytes(16)
    made = ApiKey(ident, key.name, key.requests_per_s, key.tokens_per_min, key.priority)
    return StoredKey(made, salt.hex(), _digest(salt, secret)), f"ellm-{ident}-{secret}"


def read_keys(path: Path) -> list[StoredKey]:
    """Raises ConfigError."""
    try:
        data = json.loads(path.read_text())
        return [_entry(item) for item in data["keys"]]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", param="api_key_file") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a file of keys: {error!r}", param="api_key_file") from None


def write_keys(path: Path, keys: Iterable[StoredKey]) -> None:
    """All at once, for the owner's eyes only."""
    entries = [{**asdict(stored.key), "salt": stored.salt, "hash": stored.hash} for stored in keys]
    text = json.dumps({"version": 1, "keys": entries}, indent=1) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(temporary, path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Whoever reads the file in order to write it does so alone on this machine. Its folder is locked, since
    the file itself is replaced. Raises ConfigError."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"cannot open {path.parent}: {error.strerror}", param="api_key_file") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def check_limits(key: ApiKey) -> None:
    """Raises ValueError for a limit of another type or out of bounds."""
    for name in ("requests_per_s", "tokens_per_min"):
        limit = getattr(key, name)
        if limit is not None and (not _is_number(limit, int | float) or not 0 <= limit <= MAX_RATE):
            raise ValueError(f"{name} = {limit!r} is no number between 0 and {MAX_RATE:g}")
    low, high = PRIORITIES
    if key.priority is not None and (not _is_number(key.priority, int) or not low <= key.priority <= high):
        raise ValueError(f"priority = {key.priority!r} is no whole number between {low} and {high}")


def _is_number(value: object, kind: type | UnionType) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _entry(item: dict[str, Any]) -> StoredKey:
    rest = {name: item[name] for name in ("name", "requests_per_s", "tokens_per_min", "priority")}
    bytes.fromhex(item["salt"]), bytes.fromhex(item["hash"])
    if not isinstance(item["id"], str) or not isinstance(rest["name"], str):
        raise ValueError("id and name are texts")
    key = ApiKey(item["id"], **rest)
    check_limits(key)
    return StoredKey(key, item["salt"], item["hash"])


def _digest(salt: bytes, secret: str) -> str:
    return sha256(salt + secret.encode()).hexdigest()


class KeyRing:
    """Checks keys. Time is an argument."""

    def __init__(self, plain: Iterable[str] = (), path: Path | None = None) -> None:
        """Raises ConfigError for a file that cannot be read."""
        self._plain = [(k.encode(), ApiKey(blake2b(k.encode(), digest_size=8).hexdigest())) for k in plain]
        self._path = path
        self._stored: dict[str, StoredKey] = {}
        self._looked_at = 0.0
        self._seen: tuple[int, int] | None = None
        if path is not None:
            self._seen = _mark(path)
            self._stored = {stored.key.id: stored for stored in read_keys(path)}

    @property
    def needed(self) -> bool:
        """Whether a call needs a key at all: with a file always, even if no key is in it yet."""
        return bool(self._plain) or self._path is not None

    def find(self, given: str, now: float) -> ApiKey | None:
        """Who that is; None for nobody."""
        self._look(now)
        found = None
        # Every key is compared, so that the time does not tell which one was near.
        for key, owner in self._plain:
            if hmac.compare_digest(given.encode(), key):
                found = owner
        if found is not None or (match := _KEY.fullmatch(given)) is None:
            return found
        stored = self._stored.get(match[1])
        if stored is None:
            return None
        same = hmac.compare_digest(_digest(bytes.fromhex(stored.salt), match[2]), stored.hash)
        return stored.key if same else None

    def _look(self, now: float) -> None:
        if self._path is None or now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        mark = _mark(self._path)
        if mark == self._seen:
            return
        self._seen = mark
        try:
            self._stored = {stored.key.id: stored for stored in read_keys(self._path)}
            log.info("%d API keys", len(self._stored))
        except ConfigError as error:
            log.error("the API keys stay as they were: %s", error.message)


def _mark(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino
