"""The Serve application of a running cluster: deployed, watched until it serves, and taken down again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ellm.deploy.tree import EllmConfig
from ellm.worker.api.errors import EllmError

NAME = "ellm"
POLL_S = 0.1


class DeployFailed(EllmError):
    """The application did not come up; the message says why."""


@dataclass(frozen=True, slots=True)
class Status:
    """What Serve says of the application."""

    state: str  # DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY, DELETING, ...
    message: str = ""
    healthy: frozenset[str] = field(default=frozenset())  # deployments
    failed: Mapping[str, str] = field(default_factory=dict)  # deployment that did not come up -> why


def build(config: EllmConfig) -> Any:
    """What `deploy` takes. Raises ConfigError for what cannot be built."""
    from ray.serve import RunTarget

    from ellm.deploy.app import build_application

    return RunTarget(target=build_application(config), name=NAME, route_prefix="/")


def deploy(target: Any) -> None:
    """Hand the application to Serve; does not wait."""
    from ray import serve

    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def status() -> Status | None:
    """None where Serve does not answer or has no such application."""
    from ray import serve
    from ray.exceptions import RayError

    try:
        found = serve.status().applications.get(NAME)
    except (RayError, TimeoutError, RuntimeError):
        return None
    if found is None:
        return None
    healthy = frozenset(name for name, item in found.deployments.items() if item.status == "HEALTHY")
    failed = {
        name: reason([item.message])
        for name, item in found.deployments.items()
        if item.status in ("DEPLOY_FAILED", "UNHEALTHY")
    }
    messages = [found.message, *(item.message for item in found.deployments.values())]
    return Status(str(found.status.value), reason(messages), healthy, failed)


def reason(messages: Sequence[str]) -> str:
    """The line of Serve's messages that says what went wrong: the last of a traceback, where there is one."""
    for message in messages:
        lines = [line.strip() for line in (message or "").splitlines() if line.strip()]
        errors = [line for line in lines if "Error: " in line or "Error(" in line]
        if errors:
            return errors[-1].rpartition("Error: ")[2]
    return " ".join(" ".join(messages).split())[:500]


def wait_for(
    deployment: str, deadline: float, meanwhile: Callable[[], None] = lambda: None, *, alone: bool = True
) -> None:
    """Until Serve calls the deployment healthy. Raises DeployFailed; if it is not `alone`, not for another
    deployment's failure."""
    seen: Status | None = None
    while time.monotonic() < deadline:
        seen = status() or seen
        if seen is not None:
            if alone and seen.state in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise DeployFailed(seen.message)
            if deployment in seen.failed:
                raise DeployFailed(seen.failed[deployment])
            if deployment in seen.healthy:
                return
        meanwhile()
        time.sleep(POLL_S)
    raise DeployFailed(f"{deployment} did not start in time{': ' + seen.message if seen else ''}")


def delete(deadline: float) -> None:
    """Take the application down: routers and workers finish what runs, within their own limits."""
    from ray import serve
    from ray.exceptions import RayError

    try:
        serve.delete(NAME, _blocking=False)
        while serve.status().applications.get(NAME) is not None and time.monotonic() < deadline:
            time.sleep(POLL_S)
    except (RayError, TimeoutError, RuntimeError):
        return  # Ray is gone: nothing is left that could be drained
