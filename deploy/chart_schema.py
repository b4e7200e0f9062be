"""The configuration tree's part of the chart's values.schema.json: what `config` and `model.config` may hold.

    python -m ellm.deploy.chart_schema           # writes it anew

Made from the tree, so that a misspelt setting is refused by Helm before anything is installed. What the chart
sets by values of its own is left out: it would be given twice. All else of that file is written by hand.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Collection
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ellm.deploy import schema
from ellm.deploy.tree import BOUNDS, EllmConfig

FILE = Path(__file__).parent.parent / "helm" / "values.schema.json"
BY_VALUES = {
    *(f"worker.model.{name}" for name in ("path", "revision", "name", "dtype", "device", "max_model_len")),
    "worker.tensor_parallel_size",
    "worker.drain_timeout_s",
    *(
        f"router.{name}"
        for name in ("num_replicas", "drain_timeout_s", "api_keys", "api_key_file", "admin_key")
    ),
    *(f"router.grpc.{name}" for name in ("tls_cert", "tls_key")),
}
SECTIONS = ("worker", "router", "controller")  # cluster.* is what the chart itself is
TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}
WIDTH = 110


def definitions() -> dict[str, Any]:
    """workerConfig, routerConfig and controllerConfig, by these names."""
    hints = get_type_hints(EllmConfig)
    return {f"{name}Config": tree(hints[name], f"{name}.", BY_VALUES) for name in SECTIONS}


def tree(cls: Any, prefix: str, left_out: Collection[str]) -> dict[str, Any]:
    """The JSON schema of a dataclass, which takes no key but its own."""
    hints, properties = get_type_hints(cls), {}
    for item in schema.fields_of(cls):
        path, hint = f"{prefix}{item.name}", hints[item.name]
        if is_dataclass(hint):
            inner = tree(hint, f"{path}.", left_out)
            if inner["properties"]:
                properties[item.name] = inner
        elif path not in left_out:
            properties[item.name] = leaf(hint, path)
    return {"type": "object", "additionalProperties": False, "properties": properties}


def leaf(hint: Any, path: str) -> dict[str, Any]:
    """The JSON schema of a setting, with its bounds."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
    if {"on", "off"} <= set(choices):
        choices += [True, False]  # what YAML 1.1 makes of them
    if choices:
        return {"enum": choices + [None] * (type(None) in options)}
    if any(get_origin(option) is tuple for option in options):
        (option,) = options
        return {"type": "array", "items": leaf(get_args(option)[0], "")}
    names = [TYPES[option] for option in options]
    found: dict[str, Any] = {"type": names[0] if len(names) == 1 else names}
    if path in BOUNDS:
        found["minimum"], found["maximum"] = BOUNDS[path]
    return found


def dumped(value: Any, indent: int = 0) -> str:
    """JSON in which what fits on a line stands on one."""
    flat = json.dumps(value)
    if not isinstance(value, dict | list) or len(flat) + indent <= WIDTH:
        return flat
    pad, end = " " * (indent + 2), " " * indent
    if isinstance(value, dict):
        items = [f"{pad}{json.dumps(key)}: {dumped(item, indent + 2)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + "\n" + end + "}"
    return "[\n" + ",\n".join(pad + dumped(item, indent + 2) for item in value) + "\n" + end + "]"


def text() -> str:
    """What the file should hold."""
    whole = json.loads(FILE.read_text())
    whole["definitions"].update(definitions())
    return dumped(whole) + "\n"


def main() -> int:
    FILE.write_text(text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
