"""Which workers a router keeps lines to when there are very many: a few of them, each router others.

Rendezvous hashing (Thaler and Ravishankar, 1998): a worker that comes or goes changes one line at most, and
the lines of all routers spread evenly. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

ALL_UP_TO = 64  # workers
CHOSEN = 32


def subset(epochs: Iterable[str], router_id: str) -> set[str]:
    """All epochs where there are at most ALL_UP_TO, else CHOSEN of them."""
    known = set(epochs)
    if len(known) <= ALL_UP_TO:
        return known
    return set(sorted(known, key=lambda epoch: _weight(epoch, router_id))[:CHOSEN])


def _weight(epoch: str, router_id: str) -> bytes:
    return blake2b(f"{router_id}/{epoch}".encode(), digest_size=8).digest()
