"""The whole configuration: one frozen tree, where its values come from, and which wins.

    defaults < the YAML file < the environment < --set < flags

This is the only file that reads the environment. A variable is `ELLM_` and the path with two underscores for
each dot: ELLM_CLUSTER__PORT=9000 (single underscores are left alone: Kubernetes makes variables such as
ELLM_PORT for a service of that name). The file, --set and flags also know the short names of ALIASES.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ellm.deploy import schema
from ellm.deploy.tree import (
    ALIASES,
    MODELS,
    OF_A_MODEL,
    TYPES,
    EllmConfig,
    make_served,
    validate,
)
from ellm.worker.api.config import ModelConfig, served_name
from ellm.worker.api.errors import ConfigError

BUNDLED_MODEL = Path(__file__).parent / "bundled" / "pydoc-5m"
ENV_PREFIX = "ELLM_"


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
    return Loaded(_build(leaves), origins)


def from_mapping(data: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> EllmConfig:
    """The tree from nested data with aliases; what `environ` sets wins. Raises ConfigError."""
    return _build({**_from_data(data), **_from_texts(_environment(environ or {}), "environment")})


def from_serve_args(args: Mapping[str, Any]) -> EllmConfig:
    """The tree of a Serve config's `args`, on the cluster that runs it, and of this node's environment: keys
    need not stand in a file that everybody reads. Raises ConfigError."""
    return from_mapping({"address": "auto", **args}, os.environ)


def _build(leaves: schema.Leaves) -> EllmConfig:
    """Raises ConfigError."""
    entries = leaves.pop(MODELS, ())
    if entries and leaves.get("worker.model.path"):
        raise ConfigError("give either model or models", param=MODELS)
    if not entries and not leaves.get("worker.model.path"):
        leaves["worker.model.path"] = str(BUNDLED_MODEL)
    config: EllmConfig = schema.build(EllmConfig, leaves)
    models = []
    for entry in entries:
        one: EllmConfig = schema.build(EllmConfig, {**leaves, **entry})
        validate(one)
        models.append(make_served(one.worker, one.cluster))
    if models:
        config = replace(config, models=tuple(models), worker=models[0].worker)
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
    rest = {key: value for key, value in data.items() if key not in ALIASES and key != MODELS}
    leaves = schema.flatten(EllmConfig, rest)
    for key, value in short.items():
        path = ALIASES[key]
        if path in leaves:
            raise ConfigError(f"{key} and {path} are the same setting; give one of them", param=path)
        leaves[path] = schema.coerce(TYPES[path], value, path)
    if data.get(MODELS):
        leaves[MODELS] = _entries(data[MODELS])
    return leaves


def _entries(data: Any) -> list[schema.Leaves]:
    """The leaves of each entry of `models`, short names too: what a worker of its own can differ in."""
    if not isinstance(data, list):
        raise ConfigError("models: expected a list, one entry with a model each", param=MODELS)
    entries, names = [], set()
    for index, item in enumerate(data):
        try:
            entry = _from_data(item)
        except ConfigError as error:
            raise ConfigError(f"models[{index}]: {error.message}", param=MODELS) from None
        for path in entry:
            if not path.startswith("worker.") and path not in OF_A_MODEL:
                raise ConfigError(f"models[{index}]: {path} is for all models alike", param=MODELS)
        if not entry.get("worker.model.path"):
            raise ConfigError(f"models[{index}]: model is required", param=MODELS)
        name = served_name(ModelConfig(entry["worker.model.path"], name=entry.get("worker.model.name")))
        if name in names:
            raise ConfigError(f"models: {name} is there twice; give one a served_model_name", param=MODELS)
        names.add(name)
        entries.append(entry)
    return entries


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
