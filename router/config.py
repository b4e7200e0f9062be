"""The router's part of the config tree: limits of the edge, and how it chooses and fails over."""

from __future__ import annotations

from dataclasses import dataclass, field

ROUTER_CPUS = 1.0  # logical CPUs of one router, for Ray's placement


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """Checked before anything is allocated."""

    max_body_bytes: int = 8 * 1024 * 1024
    max_n: int = 128
    max_prompts: int = 256  # of one completion request
    max_stop: int = 16
    max_stop_chars: int = 1024
    max_logprobs: int = 20
    max_logit_bias: int = 1024
    max_messages: int = 4096
    max_inflight: int = 4096  # sequences in one router; beyond it 429
    request_deadline_s: float = 3600.0
    max_client_buffer_bytes: int = 1024 * 1024  # a client that reads slower is cut off
    max_headers: int = 96  # HAProxy takes no more than 101
    max_header_bytes: int = 14 * 1024  # of all together; HAProxy takes 15 KiB
    receive_timeout_s: float = 60.0  # for a request's headers, its body, and a client to take a piece
    max_unread_bytes: int = 512 * 1024 * 1024  # of all bodies that one router is reading; beyond it 429
    min_slo_ms: float = 1.0  # of what a client may ask for, per token and to the first token
    max_slo_ms: float = 3_600_000.0
    min_priority: int = -100  # lower runs first; 0: no client may push ahead
    max_priority: int = 100
    max_json_blanks: int = 1  # in a row between JSON tokens of a constrained answer; 0: compact


@dataclass(frozen=True, slots=True)
class FailoverConfig:
    suspect_s: float = 1.0
    fail_s: float = 3.0
    max_failovers: int = 2  # after worker deaths; drains are free
    hold_s: float = 300.0  # a request that a worker had taken waits so long for another one to come up


@dataclass(frozen=True, slots=True)
class GrpcConfig:
    """Of the gRPC server, where `cluster.grpc_port` says that there is one."""

    tls_cert: str | None = None  # PEM files, the chain and its key: with both TLS is on
    tls_key: str | None = None


@dataclass(frozen=True, slots=True)
class RouterConfig:
    num_replicas: int = 1
    policy: str = "headroom"
    tokenizer: str | None = None  # a folder or hub id; None: the model's own
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    failover: FailoverConfig = field(default_factory=FailoverConfig)
    api_keys: tuple[str, ...] = ()  # without these and a file of keys the server is open
    api_key_file: str | None = None  # of hashed keys with limits, as `ellm keys` writes it
    admin_key: str | None = None  # opens /metrics and /admin; with API keys alone they are closed
    audit_log: str = "auto"  # a line per request: a file, "-" (standard output), "off"; "auto": "-" with keys
    cors_origins: tuple[str, ...] = ()  # empty: off
    refresh_s: float = 1.0  # of the worker directory
    queue_timeout_s: float = 30.0  # a request waits so long for a worker to be up
    heartbeat_s: float = 1.0  # to each worker, so that the lease holds
    pace_streams: bool = False  # release tokens that are ahead of their SLO evenly; clients may say otherwise
    pace_max_hold_s: float = 10.0  # at most so many seconds of a paced stream are held
    pace_max_hold_tokens: int = 1024
    drain_timeout_s: float = 60.0  # a router that goes waits so long for its open streams
    grpc: GrpcConfig = field(default_factory=GrpcConfig)
