"""From which ends a missing stretch that the host has is filled: by copies, by computing, or by both at once.

With f tokens per second from rows at the front and l from copies at the back, both together take f / (f + l)
less time than copies alone. Where one end does next to nothing it is left out: rows that gain no time still
lengthen everybody's step, and copies that gain none still take the link from others.
"""

from __future__ import annotations

from enum import Enum

_GAIN = 0.1  # of the time: less is not worth a second path


class RestorePath(Enum):
    BOTH = "both"
    LOAD = "load"
    COMPUTE = "compute"


def restore_path(computed_per_s: float, loaded_per_s: float) -> RestorePath:
    """Rates are tokens per second, of the front and of the back."""
    least = _GAIN * (computed_per_s + loaded_per_s)
    if computed_per_s < least:
        return RestorePath.LOAD
    return RestorePath.COMPUTE if loaded_per_s < least else RestorePath.BOTH
