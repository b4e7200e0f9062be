"""How long a worker that keeps failing waits before it tries again.

Serve starts a failed replica anew at once, however often: a worker that has once run and can load no more
(its checkpoint is gone, its device is broken) would be started for ever at full speed. Each worker's failures
in a row are counted in the cluster's own store, where the next incarnation finds them on whatever node.
"""

from __future__ import annotations

FREE = 3  # failures in a row without a pause: a bad node or a bad moment
MAX_S = 60.0
GOOD_S = 30.0  # a worker that has served so long has not failed in a row


def pause_s(num_failures: int) -> float:
    """0 for the first few, then 2, 4, 8, ... up to a minute."""
    return 0.0 if num_failures <= FREE else min(MAX_S, 2.0 ** min(16, num_failures - FREE))


class FailureCount:
    """Of one worker id of one deployment of one config, over its incarnations."""

    def __init__(self, key: str) -> None:
        self._key = f"ellm-failures:{key}".encode()

    def read(self) -> int:
        from ray.experimental.internal_kv import _internal_kv_get

        value = _internal_kv_get(self._key)
        return int(value) if value else 0

    def failed(self) -> int:
        """One more; returns how many there are in a row."""
        return self._write(self.read() + 1)

    def succeeded(self) -> None:
        self._write(0)

    def _write(self, count: int) -> int:
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(self._key, str(count).encode(), overwrite=True)
        return count
