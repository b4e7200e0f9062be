"""What Serve's ingress is told of routers."""

from __future__ import annotations

from ellm.deploy.ray_cluster import environment
from ellm.deploy.tree import EllmConfig
from ellm.router.config import RouterConfig
from ellm.router.ingress import ingress_environment


def test_an_old_ingress_lives_until_the_longest_request_has_ended() -> None:
    config = RouterConfig()
    told = ingress_environment(config.limits.request_deadline_s, 1.0)
    assert float(told["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > config.limits.request_deadline_s


def test_a_router_that_goes_stays_until_the_ingress_knows() -> None:
    told = ingress_environment(1.0, 1.0)
    period_s = float(told["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"])
    assert 2.0 <= period_s < RouterConfig().drain_timeout_s


def test_headers_take_no_longer_at_the_ingress_than_at_a_router() -> None:
    told = ingress_environment(1.0, 7.2)["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"]
    assert told.split("\n    ") == ["leastconn", "timeout http-request 8s"]


def test_ellm_serve_tells_it_so() -> None:
    config = EllmConfig()
    limits = config.router.limits
    told = ingress_environment(limits.request_deadline_s, limits.receive_timeout_s)
    assert told.items() <= environment(config, True).items()
