"""How long a worker that keeps failing waits before it tries again.

Serve starts a failed replica anew at once, however often: a worker that has once run and can load no more
(its checkpoint is gone, its device is broken) would be started for ever at full speed. Each worker's failures
in a row are counted in the cluster's own store, where the next incarnation finds them on whatever node.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

FREE = 3  # failures in a row without a pause: a bad node or a bad moment
MAX_S = 60.0
STORE_TIMEOUT_S = 2.0
GOOD_S = 30.0  # a worker that has served so long has not failed in a row


def pause_s(num_failures: int) -> float:
    """0 for the first few, then 2, 4, 8, ... up to a minute."""
    return 0.0 if num_failures <= FREE else min(MAX_S, 2.0 ** min(16, num_failures - FREE))


class FailureCount:
    """Of one worker id of one deployment of one config, over its incarnations. The store may be away: then
    nothing is counted, and nobody waits for it longer than `STORE_TIMEOUT_S`."""

    def __init__(self, key: str) -> None:
        self._key = f"ellm-failures:{key}".encode()

    async def read(self) -> int:
        """How many there are in a row; 0 where nobody says."""
        return await self._ask() or 0

    async def failed(self) -> None:
        """One more."""
        count = await self._ask()
        if count is not None:
            await self._write(count + 1)

    async def succeeded(self) -> None:
        await self._write(0)

    async def _ask(self) -> int | None:
        """None where nobody says."""
        from ray.experimental.internal_kv import _internal_kv_get

        try:
            return int(await _in_time(_internal_kv_get, self._key) or 0)
        except Exception as error:  # the edge: whatever the store's transport raises
            log.warning("nobody says how often %s: %r", self._key, error)
            return None

    async def _write(self, count: int) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        try:
            await _in_time(_internal_kv_put, self._key, str(count).encode(), True)  # overwrite
        except Exception as error:  # the edge: whatever the store's transport raises
            log.warning("%s = %d is not kept: %r", self._key, count, error)


async def _in_time(call: Callable[..., Any], *args: Any) -> Any:
    """What a call of the store returns. Such a call blocks its thread for as long as the store is away, and
    the event loop has leases of ranks to renew meanwhile."""
    return await asyncio.wait_for(asyncio.to_thread(call, *args), STORE_TIMEOUT_S)
