"""RayDirectory: which workers there are, by the names of their rank actors.

It asks Ray's control store and nobody else, so a new router finds every worker while the controller is down.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import list_named_actors

from ellm.router.stream_channel import StreamChannel
from ellm.worker.api import wire
from ellm.worker.api.actor_name import NAMESPACE, epoch_of

log = logging.getLogger(__name__)

DESCRIBE_TIMEOUT_S = 1.0


class RayDirectory:
    """Knows each incarnation once: its channel stays the same object as long as its actor has its name."""

    def __init__(self, model: str | None = None) -> None:
        """`model` is the served name: workers of other models on the cluster are not ours. None: all are."""
        self._model = model
        self._channels: dict[str, StreamChannel] = {}

    async def refresh(self) -> Mapping[str, StreamChannel]:
        """Epoch -> channel of every worker that has loaded and whose actor lives."""
        names = await asyncio.to_thread(_rank_names, self._model)
        new = [(epoch, name) for epoch, name in names.items() if epoch not in self._channels]
        found = await asyncio.gather(*(self._try_open(name) for _, name in new))
        opened = {
            epoch: channel for (epoch, _), channel in zip(new, found, strict=True) if channel is not None
        }
        kept = {epoch: channel for epoch, channel in self._channels.items() if epoch in names}
        self._channels = kept | opened
        return dict(self._channels)

    async def _try_open(self, name: str) -> StreamChannel | None:
        try:
            return await _open(name)
        except Exception:  # one worker that speaks another language hides no other
            log.exception("%s cannot be understood", name)
            return None


def _rank_names(model: str | None) -> dict[str, str]:
    """Epoch -> name of every rank actor of `model` that is not dead."""
    names = {}
    for actor in list_named_actors(all_namespaces=True):
        epoch = epoch_of(actor["name"], model) if actor["namespace"] == NAMESPACE else None
        if epoch is not None:
            names[epoch] = actor["name"]
    return names


async def _open(name: str) -> StreamChannel | None:
    """The channel to this actor; None if it has died since, loads still, or does not answer in time."""
    try:
        handle: Any = await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
        described = await asyncio.wait_for(handle.describe.remote(), DESCRIBE_TIMEOUT_S)
    except (ValueError, RayError, TimeoutError) as error:
        log.debug("%s does not answer: %r", name, error)
        return None
    if described is None:
        return None
    packed, host, port, secret = described[:4]
    return StreamChannel(wire.unpack_info(packed), host, port, secret)
