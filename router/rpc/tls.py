"""The gRPC server's certificate and key, read and tried before anything starts. Without gRPC itself."""

from __future__ import annotations

import ssl
from pathlib import Path

from ellm.router.config import GrpcConfig
from ellm.worker.api.errors import ConfigError


def read_pair(config: GrpcConfig) -> tuple[bytes, bytes] | None:
    """The key and the certificate's chain, in PEM; None where TLS is off. Raises ConfigError that names the
    setting."""
    if config.tls_cert is None and config.tls_key is None:
        return None
    cert, key = _read(config.tls_cert, "tls_cert"), _read(config.tls_key, "tls_key")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(str(config.tls_cert), str(config.tls_key), password="")
    except (ssl.SSLError, ValueError):
        reason = f"{config.tls_cert} and {config.tls_key} are no certificate and its open key in PEM"
        raise _error("tls_cert", reason) from None
    return key, cert


def _read(path: str | None, name: str) -> bytes:
    if path is None:
        raise _error(name, "TLS needs a certificate and its key")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _error(name, f"cannot read {path}: {error.strerror}") from None


def _error(name: str, reason: str) -> ConfigError:
    param = f"router.grpc.{name}"
    return ConfigError(f"{param}: {reason}", param=param)
