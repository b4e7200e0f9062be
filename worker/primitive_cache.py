"""How many compiled routines the CPU's matrix library keeps. To be set before torch is imported.

oneDNN and torch's layer above it each keep one for every shape that they have met, a thousand at most. Steps
have another number of rows each, so on a server that is a few MiB for every number of rows and layer: two
small workers grew by 11 GiB per hour. The least recently used go instead; making one again costs less than a
step can show. What the user has set stays.
"""

from __future__ import annotations

import os

_CAPACITY = "64"
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def bound_primitive_caches() -> None:
    """In this process, and in those that it starts."""
    for name in VARIABLES:
        os.environ.setdefault(name, _CAPACITY)
