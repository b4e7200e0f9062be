"""The models of one router: which of them a request means, and how each is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ellm.router import health
from ellm.router.errors import unknown_model
from ellm.router.exchange import Service
from ellm.router.keys import ApiKey
from ellm.router.link import WorkerLink
from ellm.worker.api.errors import InvalidRequest, Unavailable


class Models:
    """Services by served name, and those that could not be made."""

    def __init__(self, services: Sequence[Service], broken: Mapping[str, str] | None = None) -> None:
        """`broken`: model -> why this router cannot serve it."""
        self.services = {service.model: service for service in services}
        self.broken = dict(broken or {})

    def visible(self, key: ApiKey | None) -> list[Service]:
        """Those that the key may use; all where there is none."""
        return [service for name, service in self.services.items() if key is None or key.may_use(name)]

    def find(self, name: str | None, key: ApiKey | None = None) -> Service:
        """Among those that `key` may use. Raises ModelNotFound, Unavailable; without a name the one there is
        is meant, InvalidRequest where there are more."""
        known = [one for one in (*self.services, *self.broken) if key is None or key.may_use(one)]
        if name is None and len(known) == 1:
            name = known[0]
        if name is None:
            raise InvalidRequest(f"one of the models {', '.join(known)}", param="model")
        if name not in known:
            raise unknown_model(name)
        if name in self.services:
            return self.services[name]
        raise Unavailable(f"the model {name!r} cannot be served", param="model", retry_after_s=60.0)

    def find_for(self, body: Any, key: ApiKey | None = None) -> Service:
        """The same for a request's body, checked or not: where its `model` is no name, whoever reads the body
        says so."""
        name = body.get("model") if isinstance(body, dict) else None
        if name is not None and not isinstance(name, str):
            return next(iter(self.visible(key) or self.services.values()))
        return self.find(name, key)

    def links(self) -> Iterator[WorkerLink]:
        """To the workers of all models."""
        for service in self.services.values():
            yield from service.dispatcher.links.values()

    def alive(self) -> health.Health:
        """False when each model had workers and has lost them all."""
        found = [health.alive(service.dispatcher) for service in self.services.values()]
        return next((one for one in found if one.ok), found[0])

    def ready(self) -> tuple[health.Health, dict[str, str]]:
        """Ready when one model is, and what to say of each; the reason names those that are not."""
        found = {name: health.ready(service.dispatcher) for name, service in self.services.items()}
        states = {name: one.status for name, one in found.items()} | dict.fromkeys(self.broken, "failed")
        if len(states) == 1 and found:
            return next(iter(found.values())), states
        reasons = [f"{name}: {one.reason}" for name, one in found.items() if not one.ok]
        reasons += [f"{name}: {reason}" for name, reason in self.broken.items()]
        ok = any(one.ok for one in found.values())
        return health.Health(ok, "ready" if ok else "unavailable", "; ".join(reasons)), states
