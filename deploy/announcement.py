"""What `ellm serve` says once it serves: where it is found, and how to ask it."""

from __future__ import annotations

import json

from ellm.deploy.tree import EllmConfig


def base_url(config: EllmConfig) -> str:
    """Where a client on this machine finds the server."""
    return f"http://{local_address(config.cluster.host, config.cluster.port)}"


def local_address(host: str, port: int) -> str:
    """The same of one port, as "host:port"."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def announce(config: EllmConfig) -> None:
    """To standard output."""
    url = base_url(config)
    body = {
        "model": config.worker.model.name,
        "prompt": "The list method append",
        "max_tokens": 32,
        "temperature": 0,
    }
    needed = config.router.api_keys or config.router.api_key_file is not None
    key = " -H 'Authorization: Bearer YOUR_KEY'" if needed else ""
    print(f"\nReady: {url}")
    if config.cluster.grpc_port is not None:
        secure = " (TLS)" if config.router.grpc.tls_cert is not None else ""
        print(f"gRPC: {local_address(config.cluster.host, config.cluster.grpc_port)}{secure}")
    print()
    print(f"  curl {url}/v1/completions -H 'Content-Type: application/json'{key} \\")
    print(f"    -d '{json.dumps(body)}'")
    chat = " --api-key YOUR_KEY" if key else ""
    print(f"  ellm chat --url {url}{chat}\n\nCtrl-C stops it.", flush=True)
