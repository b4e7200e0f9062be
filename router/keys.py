"""API keys and the file that holds them: who may call, which models, how much, how urgent, whose cache.

A key of the file is `ellm-ID-SECRET`: the id finds its entry, the secret is 32 random bytes, of which the
file holds the salted SHA-256 (a slow hash is for secrets that can be guessed). What cannot be read is refused
with its line. Knows nothing of who asks: that is `key_ring`'s.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import UnionType
from typing import Any

from ellm.worker.api.errors import ConfigError

MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_RATE = 1e12
MAX_MODELS = 1000
PRIORITIES = (-(2**31 - 1), 2**31 - 1)
_LIMITS = ("id", "name", "requests_per_s", "tokens_per_min", "priority")
_ENTRY = (*_LIMITS, "models", "cache_salt", "salt", "hash")
_OPTIONAL = {"models": None, "cache_salt": None}  # older files lack them
_ID, _HEX = re.compile(r"[0-9a-f]{8}"), re.compile(r"([0-9a-f]{2}){8,64}")
_SALT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADER = re.compile(r"[!-~]{1,512}")  # what a header can bring


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What a key may do. `id` stands for it everywhere: in budgets, metrics and audit lines."""

    id: str
    name: str = ""
    requests_per_s: float | None = None  # over the whole cluster; None: no limit
    tokens_per_min: float | None = None  # prompt and output together
    priority: int | None = None  # of its requests, and the best they may ask for; lower runs first; None: any
    models: tuple[str, ...] | None = None  # served names that it may use; None: all
    cache_salt: str | None = None  # keys of one salt share cached prompts; None: the key shares with none

    @property
    def salt(self) -> str:
        """Of its prompts in the prefix cache. No other key's id can be a salt: it has no plus sign."""
        return self.id if self.cache_salt is None else f"+{self.cache_salt}"

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


@dataclass(frozen=True, slots=True)
class StoredKey:
    """An entry of the file."""

    key: ApiKey
    salt: str  # hex
    hash: str  # hex

    def opens(self, secret: str) -> str:
        """What `hash` is if the secret is the right one."""
        return sha256(bytes.fromhex(self.salt) + secret.encode()).hexdigest()


def new_key(key: ApiKey) -> tuple[StoredKey, str]:
    """An entry with a new id, and the key itself, which is kept nowhere."""
    ident, secret, salt = secrets.token_hex(4), secrets.token_urlsafe(32), secrets.token_bytes(16).hex()
    stored = StoredKey(replace(key, id=ident), salt, "")
    return replace(stored, hash=stored.opens(secret)), f"ellm-{ident}-{secret}"


def read_keys(path: Path) -> list[StoredKey]:
    """Raises ConfigError with the file's name and the line at fault."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise _refusal(path, f"is larger than {MAX_FILE_BYTES} bytes")
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", param="api_key_file") from None
    except UnicodeDecodeError:
        raise _refusal(path, "is no file of keys: not UTF-8") from None
    try:
        entries = _entries(json.loads(text))
    except json.JSONDecodeError as error:
        raise _refusal(path, f"line {error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"is no file of keys: {error}"[:200]) from None
    keys: dict[str, StoredKey] = {}
    for index, item in enumerate(entries):
        try:
            stored = _entry(item)
            if stored.key.id in keys:
                raise _Fault("id", "is there twice")
        except _Fault as fault:
            line = _line(text, index, fault.field)
            raise _refusal(path, f"line {line}: {fault.field}: {fault.reason}") from None
        keys[stored.key.id] = stored
    return list(keys.values())


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


def check_plain_key(key: str, where: str) -> None:
    """Of a key that the config holds. Raises ConfigError for one that no client could send, or anybody could:
    it never says what the key is."""
    if _HEADER.fullmatch(key):
        return
    broken = re.search(r"[\r\n]", key)
    if not key:
        fault = "is empty: it would let everybody in"
    elif broken:
        fault = f"has a line break after {broken.start()} characters; each key stands in a line of its own"
    else:
        fault = "has blanks, or characters that no header can carry, or more than 512"
    raise ConfigError(f"{where} {fault}", param=where)


def check_limits(key: ApiKey) -> None:
    """Raises ValueError for a field of another type or out of bounds."""
    for name in ("requests_per_s", "tokens_per_min"):
        limit = getattr(key, name)
        if limit is not None and (not _is_number(limit, int | float) or not 0 <= limit <= MAX_RATE):
            raise _Fault(name, f"{limit!r} is no number between 0 and {MAX_RATE:g}")
    low, high = PRIORITIES
    if key.priority is not None and (not _is_number(key.priority, int) or not low <= key.priority <= high):
        raise _Fault("priority", f"{key.priority!r} is no whole number between {low} and {high}")
    if not isinstance(key.name, str) or not key.name.isprintable():
        raise _Fault("name", "a text of one line")
    if key.cache_salt is not None and not _matches(_SALT, key.cache_salt):
        raise _Fault("cache_salt", "1 to 64 letters, digits, ., _ and -")
    if key.models is not None and (
        not 0 < len(key.models) <= MAX_MODELS or not all(isinstance(m, str) and m for m in key.models)
    ):
        raise _Fault("models", f"a list of 1 to {MAX_MODELS} served names")


class _Fault(ValueError):
    """What is wrong with a field of an entry."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def _refusal(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path} {reason}", param="api_key_file")


def _is_number(value: object, kind: type | UnionType) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _entries(data: Any) -> list[Any]:
    if not isinstance(data, Mapping) or not isinstance(data.get("keys"), list):
        raise ValueError("an object with a list `keys`")
    if data.get("version", 1) != 1:
        raise ValueError(f"version {data['version']!r} is not known here")
    return data["keys"]  # type: ignore[no-any-return]


def _entry(item: Any) -> StoredKey:
    """Raises _Fault. A field that is not known is refused: it might be a limit, misspelt."""
    if not isinstance(item, Mapping):
        raise _Fault("keys", "a list of objects")
    item = {**_OPTIONAL, **item}
    for name in item.keys() ^ set(_ENTRY):
        raise _Fault(str(name)[:64], "is missing" if name in _ENTRY else "is no field of a key")
    if not _matches(_ID, item["id"]):
        raise _Fault("id", "eight hexadecimal digits, and no line break")
    for name in ("salt", "hash"):
        if not _matches(_HEX, item[name]):
            raise _Fault(name, "hexadecimal digits, and no line break")
    models = item["models"]
    if not isinstance(models, list | None):
        raise _Fault("models", "a list of served names")
    own = {name: item[name] for name in _LIMITS}
    key = ApiKey(**own, models=None if models is None else tuple(models), cache_salt=item["cache_salt"])
    check_limits(key)
    return StoredKey(key, item["salt"], item["hash"])


def _line(text: str, index: int, field: str) -> int:
    """Where the entry of this index has the field, or where the entry begins."""
    head, decoder = re.search(r'"keys"\s*:\s*\[\s*', text), json.JSONDecoder()
    at = end = 0 if head is None else head.end()
    try:
        for _ in range(index + 1):
            at = end
            while text[at] in ", \t\r\n":
                at += 1
            _, end = decoder.raw_decode(text, at)
    except (ValueError, IndexError):  # another "keys" stood before
        return 1
    found = text.find(f'"{field}"', at, end)
    return text.count("\n", 0, at if found < 0 else found) + 1
