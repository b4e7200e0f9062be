"""What Serve's ingress, HAProxy, has to know of routers. Read by Serve where its processes start.

A router that goes is taken from HAProxy's list by a reload; the old HAProxy process lives on for the streams
that it carries.
"""

from __future__ import annotations

import math

# A router that goes stays as it is until HAProxy has been told. Closed at once, it would take with it what
# comes in on a kept-alive connection at that moment: HAProxy cannot send that again and closes its client's
# line without a word. A reload takes half a second, two on a busy machine.
DRAINING_PERIOD_S = 3


def ingress_environment(request_deadline_s: float, receive_timeout_s: float) -> dict[str, str]:
    """`request_deadline_s`: what the longest request may take; until then an old HAProxy process may live.
    `receive_timeout_s`: how long headers may take, which HAProxy reads before it asks a router."""
    return {
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": balance(receive_timeout_s),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # the router counts by itself
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(request_deadline_s) + 5),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAINING_PERIOD_S),
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.1",  # Serve's own proxies carry nothing of ours
    }


def balance(receive_timeout_s: float) -> str:
    """Serve's own way to balance, and a line that it has no setting for: without it, a client that sends a
    byte of its headers now and then holds one of HAProxy's connections for ever. Serve writes this text to
    the defaults of HAProxy's configuration as it is."""
    return f"leastconn\n    timeout http-request {math.ceil(receive_timeout_s)}s"
