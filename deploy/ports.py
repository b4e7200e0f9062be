"""Ports on this machine: whether one is free to listen on, and some that are."""

from __future__ import annotations

import errno
import socket

from ellm.worker.api.errors import ConfigError


def check_free(host: str, port: int, param: str) -> None:
    """Raises ConfigError when nothing of ours could listen there.

    Tried without SO_REUSEPORT, on purpose: with it two servers would share the port and each get half of
    the other's requests.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except socket.gaierror:
            raise ConfigError(f"{host} is not an address of this machine", param="cluster.host") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"port {port} is in use by another program; choose one with --{param.replace('_', '-')}",
                    param=f"cluster.{param}",
                ) from None
            reason = f"cannot listen on {host}:{port}: {error.strerror}"
            raise ConfigError(reason, param="cluster.host") from None


def free_ports(count: int) -> list[int]:
    """So many different ports that nobody listens on now."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()
