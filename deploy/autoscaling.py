"""Serve's autoscaling policy for workers: as many as the controller says, and otherwise as many as there are.

It runs in Serve's own controller, several times a second for each deployment, so it never waits: it asks, and
goes by the last answer. It says how many there are by now: a controller that has just started goes on from
there. Serve sees no requests of ours, so its own figures say nothing here; hysteresis and
bounds are the brain's (cluster/scaling.py), Serve applies its bounds once more. Serve ships this module by
value: it imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import ray

CONTROLLER = ("ellm-controller", "ellm")  # name and namespace, as in cluster/actor.py
ASK_S = 0.5


class FollowController:
    """One per deployment; `model` is the served name."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._target: int | None = None
        self._asked_at = 0.0
        self._thread: threading.Thread | None = None

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """(number of replicas, state to keep) for Serve's AutoscalingContext."""
        asking = self._thread is not None and self._thread.is_alive()
        if not asking and time.monotonic() - self._asked_at >= ASK_S:
            self._asked_at = time.monotonic()
            asked = (context.target_num_replicas,)
            self._thread = threading.Thread(target=self._ask, args=asked, daemon=True)
            self._thread.start()
        return (context.target_num_replicas if self._target is None else self._target), {}

    def _ask(self, current: int) -> None:
        """On a thread of its own: finding an actor and waiting for it block. Without a controller the last
        target stays."""
        with contextlib.suppress(Exception):
            controller = ray.get_actor(*CONTROLLER)
            answer = controller.targets.remote({self._model: current})
            self._target = ray.get(answer, timeout=5.0).get(self._model, self._target)
