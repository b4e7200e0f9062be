"""`ellm version`: the installed versions, read from their metadata (nothing is imported)."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("ellm-on-ray", "ray", "torch", "transformers", "tokenizers", "numba", "triton")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(args: argparse.Namespace) -> int:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["python"] = platform.python_version()
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"ellm {found.pop('ellm-on-ray')}")
    print(" ".join(f"{name} {value or '(not installed)'}" for name, value in found.items()))
    return 0
