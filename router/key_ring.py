"""Who a key belongs to: those of the config, and those of a file that is read again when it changes.

A file that cannot be read then changes nothing: the keys known so far stay, the log and the metrics say so,
and it is tried again every second. Keys of the config have no limits. Time is an argument.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

from ellm.router import metrics_declared as declared
from ellm.router.keys import ApiKey, StoredKey, check_plain_key, read_keys
from ellm.worker.api.errors import ConfigError
from ellm.worker.api.metrics import Key

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between looks at the file
_KEY = re.compile(r"ellm-([0-9a-f]{8})-([A-Za-z0-9_-]{43})")
_Mark = tuple[int, int, int]


class KeyRing:
    """One per router."""

    def __init__(self, plain: Iterable[str] = (), path: Path | None = None) -> None:
        """Raises ConfigError for a file that cannot be read, and for a plain key that nobody can send."""
        self._plain: list[tuple[bytes, ApiKey]] = []
        for index, key in enumerate(plain):
            check_plain_key(key, f"router.api_keys[{index}]")
            ident = blake2b(key.encode(), digest_size=8).hexdigest()
            self._plain.append((key.encode(), ApiKey(ident)))
        self._path = path
        self._stored: dict[str, StoredKey] = {}
        self._looked_at = 0.0
        self._seen: _Mark | None = None  # the file as it was when it was read last
        self._told: _Mark | None = None  # the broken file that the log has told of
        self.broken = ""  # why the file cannot be read now
        self.reloads: Counter[str] = Counter()  # outcome -> times
        if path is not None:
            self._seen = _mark(path)
            self._stored = {stored.key.id: stored for stored in read_keys(path)}

    @property
    def needed(self) -> bool:
        """Whether a call needs a key at all: with a file always, even if no key is in it yet."""
        return bool(self._plain) or self._path is not None

    def find(self, given: str, now: float) -> ApiKey | None:
        """Who that is; None for nobody."""
        self.look(now)
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
        return stored.key if hmac.compare_digest(stored.opens(match[2]), stored.hash) else None

    def look(self, now: float) -> None:
        """Read the file again if it has changed, not more often than every LOOK_S."""
        if self._path is None or now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        mark = _mark(self._path)
        if mark == self._seen and not self.broken:
            return
        try:
            self._stored = {stored.key.id: stored for stored in read_keys(self._path)}
        except ConfigError as error:
            self._refuse(error.message, mark)
            return
        self._seen, self._told, self.broken = mark, None, ""
        self.reloads["loaded"] += 1
        log.info("the API keys have changed: %d of them", len(self._stored))

    def _refuse(self, reason: str, mark: _Mark | None) -> None:
        """It is looked at again, for who writes it may not be done; each state of it is told of once."""
        if not self.broken or mark != self._told:
            self.reloads["failed"] += 1
            log.error("the API keys stay as they were: %s", reason)
        self._told, self.broken = mark, reason

    async def watch(self, clock: Callable[[], float]) -> None:
        """Look for ever, so that a broken file is known before somebody comes with a key."""
        while self._path is not None:
            await asyncio.sleep(LOOK_S)
            try:
                await asyncio.to_thread(self.look, clock())  # a file system may hang
            except Exception:  # the next look is another
                log.exception("the API keys could not be looked at")

    def series(self) -> Iterator[tuple[Key, float]]:
        """What has been counted."""
        for outcome, count in self.reloads.items():
            yield (declared.KEY_RELOADS.name, outcome), count

    def gauges(self, router: str) -> Iterator[tuple[Key, float]]:
        """What holds now."""
        yield (declared.KEYS.name, router), float(len(self._plain) + len(self._stored))
        yield (declared.KEY_FILE_BROKEN.name, router), float(bool(self.broken))


def _mark(path: Path) -> _Mark | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
