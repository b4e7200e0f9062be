"""The configuration as YAML that loads again, and says of each leaf where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from ellm.deploy import schema
from ellm.deploy.tree import MODELS, REDACTED, EllmConfig, ServedModel

SECRETS = ("router.api_keys", "router.admin_key")


def dump(config: EllmConfig, origins: Mapping[str, str] | None = None, *, redacted: bool = False) -> str:
    """The tree as YAML that loads again; a leaf that is not a default says where it came from. `redacted`:
    without keys, and where there are any it does not load, so that nobody serves without them unawares."""
    lines: list[str] = []
    sections: list[str] = []
    for path, value in schema.unbuild(config).items():
        if config.models and path.startswith("worker."):  # each entry says it all
            continue
        if redacted and path in SECRETS and value:
            value = REDACTED if isinstance(value, str) else (REDACTED,) * len(value)
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
    if config.models:
        lines.append(f"{MODELS}:")
        lines += [
            f"- {line}" if i == 0 else f"  {line}" for m in config.models for i, line in _entry_lines(m)
        ]
    return "\n".join(lines) + "\n"


def _entry_lines(model: ServedModel) -> Iterator[tuple[int, str]]:
    """One entry of `models` as YAML that loads again."""
    leaves = {f"worker.{path}": value for path, value in schema.unbuild(model.worker).items()}
    tree: dict[str, Any] = {
        "workers": model.num_workers, "min_workers": model.min_workers, "max_workers": model.max_workers
    }  # fmt: skip
    for path, value in leaves.items():
        *parents, name = path.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = list(value) if isinstance(value, tuple) else value
    yield from enumerate(yaml.safe_dump(tree, sort_keys=False).splitlines())
