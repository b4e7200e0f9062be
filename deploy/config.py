"""The whole configuration: one frozen tree, where its values come from, and which wins.

    defaults < the YAML file < the environment < --set < flags

This is the only file that reads the environment. A variable is `ELLM_` and the path with two underscores for
each dot: ELLM_CLUSTER__PORT=9000 (single underscores are left alone: Kubernetes makes variables such as
ELLM_PORT for a service of that name). Every source also knows the short names of ALIASES.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ellm.cluster.api.config import ControllerConfig
from ellm.deploy import schema
from ellm.router.config import RouterConfig
from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.errors import ConfigError

BUNDLED_MODEL = Path(__file__).parent / "bundled" / "pydoc-5m"
ENV_PREFIX = "ELLM_"


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """How many of what run where."""

    address: str | None = None  # of a running Ray cluster ("auto": this machine's); None: a Ray of our own
    num_workers: int = 2
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    haproxy: bool = True  # HTTP comes in through HAProxy; false: Ray Serve's own proxy
    dashboard: bool = False  # of the Ray we start
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    worker_num_cpus: float = 0.5  # logical CPUs of a rank on a CPU, for Ray's placement
    start_timeout_s: float = 600.0  # until every worker has loaded its weights
    object_store_bytes: int = 128 * 1024 * 1024  # of the Ray we start; the data path hardly uses it


@dataclass(frozen=True, slots=True)
class EllmConfig:
    """Everything that can be set."""

    worker: WorkerConfig = field(default_factory=WorkerConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)


# Short names, for every source.
ALIASES = {
    "model": "worker.model.path",
    "served_model_name": "worker.model.name",
    "revision": "worker.model.revision",
    "device": "worker.model.device",
    "dtype": "worker.model.dtype",
    "max_model_len": "worker.model.max_model_len",
    "kv_blocks": "worker.cache.num_blocks",
    "block_size": "worker.cache.block_size",
    "tp": "worker.tensor_parallel_size",
    "threads": "worker.num_threads",
    "workers": "cluster.num_workers",
    "routers": "router.num_replicas",
    "policy": "worker.scheduler.policy",
    "tpot_slo_ms": "worker.scheduler.tpot_slo_ms",
    "ttft_slo_ms": "worker.scheduler.ttft_slo_ms",
    "routing_policy": "router.policy",
    "pace_streams": "router.pace_streams",
    "api_keys": "router.api_keys",
    "address": "cluster.address",
    "host": "cluster.host",
    "port": "cluster.port",
    "grpc_port": "cluster.grpc_port",
    "log_level": "cluster.log_level",
}

# path -> (lowest, highest) of numbers that would otherwise fail late or never.
BOUNDS: dict[str, tuple[float, float]] = {
    "cluster.num_workers": (1, 4096),
    "cluster.port": (1, 65535),
    "cluster.grpc_port": (1, 65535),
    "cluster.worker_num_cpus": (0, 1024),
    "cluster.start_timeout_s": (1, 86400),
    "router.num_replicas": (1, 1024),
    "router.pace_max_hold_s": (0.0, 3600.0),
    "router.pace_max_hold_tokens": (0, 1 << 20),
    "router.limits.min_slo_ms": (0.001, 3_600_000),
    "router.limits.max_slo_ms": (0.001, 3_600_000),
    "router.limits.min_priority": (-(2**31 - 1), 2**31 - 1),
    "router.limits.max_priority": (-(2**31 - 1), 2**31 - 1),
    "worker.tensor_parallel_size": (1, 64),
    "worker.num_threads": (1, 1024),
    "worker.model.max_model_len": (1, 1 << 24),
    "worker.cache.block_size": (1, 1024),
    "worker.cache.num_blocks": (2, 1 << 31),
    "worker.cache.memory_fraction": (0.01, 1.0),
    "worker.cache.host_bytes": (0, 1 << 50),
    "worker.cache.transient_blocks": (0, 1 << 24),
    "worker.scheduler.max_num_seqs": (1, 65536),
    "worker.scheduler.max_step_tokens": (1, 1 << 24),
    "worker.scheduler.max_waiting": (1, 1 << 24),
    "worker.scheduler.watermark": (0.0, 0.9),
    "worker.scheduler.pipeline_depth": (1, 2),
    "worker.scheduler.tpot_slo_ms": (0.01, 3_600_000),
    "worker.scheduler.ttft_slo_ms": (0.01, 3_600_000),
}

TYPES = dict(schema.leaf_types(EllmConfig))


@dataclass(frozen=True, slots=True)
class Loaded:
    """A config and, for each leaf that is not a default, where it came from."""

    config: EllmConfig
    origins: Mapping[str, str]


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not the last one's victory."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key} is given twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load(
    file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    settings: Iterable[str] = (),
    flags: Mapping[str, str] | None = None,
) -> Loaded:
    """The tree from all sources, its own "auto"s resolved. Raises ConfigError.

    `settings` are "path=value" texts; `flags` maps a path or alias to its text. `environ` is os.environ where
    it is None.
    """
    leaves: schema.Leaves = {}
    origins: dict[str, str] = {}
    for origin, layer in (
        *([(str(file), read_file(Path(file)))] if file is not None else []),
        ("environment", _from_texts(_environment(os.environ if environ is None else environ), "environment")),
        ("--set", _from_texts(_settings(settings), "--set")),
        ("command line", _from_texts((flags or {}).items(), "command line")),
    ):
        leaves.update(layer)
        origins.update(dict.fromkeys(layer, origin))
    if not leaves.get("worker.model.path"):
        leaves["worker.model.path"] = str(BUNDLED_MODEL)
    config: EllmConfig = schema.build(EllmConfig, leaves)
    validate(config)
    return Loaded(config, origins)


def from_mapping(data: Mapping[str, Any]) -> EllmConfig:
    """The tree from nested data with aliases, as in a Serve config's `args`. Raises ConfigError."""
    leaves = _from_data(data)
    leaves.setdefault("worker.model.path", str(BUNDLED_MODEL))
    config: EllmConfig = schema.build(EllmConfig, leaves)
    validate(config)
    return config


def read_file(path: Path) -> schema.Leaves:
    """The leaves that a YAML file sets. Raises ConfigError with the file's name."""
    try:
        data = yaml.load(path.read_text(), Loader=_StrictLoader)
        return _from_data({} if data is None else data)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", param=error.param) from None


def _from_data(data: Any) -> schema.Leaves:
    if not isinstance(data, Mapping):
        return schema.flatten(EllmConfig, data)  # raises
    short = {key: value for key, value in data.items() if key in ALIASES}
    leaves = schema.flatten(EllmConfig, {key: value for key, value in data.items() if key not in ALIASES})
    for key, value in short.items():
        path = ALIASES[key]
        if path in leaves:
            raise ConfigError(f"{key} and {path} are the same setting; give one of them", param=path)
        leaves[path] = schema.coerce(TYPES[path], value, path)
    return leaves


def _environment(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Settings among the variables: ELLM_ with a double underscore in it."""
    return [
        (name.removeprefix(ENV_PREFIX).lower().replace("__", "."), value)
        for name, value in sorted(environ.items())
        if name.startswith(ENV_PREFIX) and "__" in name
    ]


def _settings(texts: Iterable[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text}: expected key=value")
        pairs.append((key.strip(), value.strip()))
    return pairs


def _from_texts(pairs: Iterable[tuple[str, str]], origin: str) -> schema.Leaves:
    leaves: schema.Leaves = {}
    for key, text in pairs:
        path = ALIASES.get(key, key)
        try:
            if path not in TYPES:
                raise schema.unknown_key(path, [*TYPES, *ALIASES])
            leaves[path] = schema.from_text(TYPES[path], text, path)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error.message}", param=path) from None
    return leaves


def validate(config: EllmConfig) -> None:
    """Refuse numbers out of bounds and settings that contradict each other. Raises ConfigError."""
    leaves = schema.unbuild(config)
    for path, (low, high) in BOUNDS.items():
        value = leaves[path]
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{path}: {value} is not between {low} and {high}", param=path)
    if config.worker.tensor_parallel_size != 1:
        raise ConfigError("only one rank per worker is supported so far (--tp 1)", param="tp")
    limits = config.router.limits
    for what, least, most in (
        ("slo_ms", limits.min_slo_ms, limits.max_slo_ms),
        ("priority", limits.min_priority, limits.max_priority),
    ):
        if least > most:
            name = f"router.limits.min_{what}"
            raise ConfigError(f"{name} is above router.limits.max_{what}", param=name)
    if config.cluster.grpc_port == config.cluster.port:
        raise ConfigError("cluster.grpc_port and cluster.port are the same port", param="cluster.grpc_port")


def dump(config: EllmConfig, origins: Mapping[str, str] | None = None) -> str:
    """The tree as YAML that loads again; a leaf that is not a default says where it came from."""
    lines: list[str] = []
    sections: list[str] = []
    for path, value in schema.unbuild(config).items():
        *parents, name = path.split(".")
        shared = 0
        while shared < min(len(parents), len(sections)) and parents[shared] == sections[shared]:
            shared += 1
        lines += [f"{'  ' * depth}{parents[depth]}:" for depth in range(shared, len(parents))]
        sections = parents
        plain = list(value) if isinstance(value, tuple) else value
        text = yaml.safe_dump(plain, default_flow_style=True, width=1 << 20).removesuffix("\n...\n").strip()
        origin = f"  # {origins[path]}" if origins and path in origins else ""
        lines.append(f"{'  ' * len(parents)}{name}: {text}{origin}")
    return "\n".join(lines) + "\n"
