"""How long a block takes between device and host, learnt from the copies that were made."""

from __future__ import annotations

_SMOOTHING = 0.2  # of a new measurement
_START_BYTES_PER_S = 8e9  # a guess for the first copies: half a PCIe 4 link


class LinkCost:
    """One direction. `block_bytes` is what a copy moves."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = max(1, block_bytes)
        self._seconds = self._block_bytes / _START_BYTES_PER_S
        self._seen = False

    @property
    def block_s(self) -> float:
        """Seconds per block."""
        return self._seconds

    def observe(self, num_bytes: int, seconds: float) -> None:
        """`num_bytes` were moved in `seconds` of copying."""
        if num_bytes <= 0 or seconds <= 0.0:
            return
        measured = seconds * self._block_bytes / num_bytes
        weight = _SMOOTHING if self._seen else 1.0
        self._seen = True
        self._seconds += weight * (measured - self._seconds)

    def blocks_in(self, seconds: float) -> int:
        """Blocks that the link moves in `seconds`; at least 1, so that it never stands still."""
        return max(1, int(seconds / self._seconds))
