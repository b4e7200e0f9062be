"""Who may import whom, and what breaks the rule: an AST walk over every import, those in functions too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TOP = ("kernels", "worker", "cluster", "router", "loadtest", "deploy")

# folder -> what it may import of the others (a prefix: "worker.api" allows worker.api.errors).
ALLOWED: dict[str, tuple[str, ...]] = {
    "kernels": (),
    "worker": ("kernels",),
    "cluster": ("worker.api",),
    "router": ("worker.api", "cluster.api"),
    "loadtest": ("kernels", "worker", "cluster", "router"),
    "deploy": ("kernels", "worker", "cluster", "router", "loadtest"),
}

# Inside worker a module imports its own rank and lower ones; modules directly in worker/ are the top.
WORKER_RANK = {"api": 0, "cache": 1, "engine": 2, "model": 3, "executor": 4, "parallel": 4}
WORKER_TOP = 5

# Brains: the standard library and each other, no clock, no concurrency, no I/O.
PURE = ("worker.api", "worker.cache", "worker.engine", "router.policies", "cluster")
BODIES = ("cluster.driver", "cluster.actor")
NOT_PURE_STDLIB = frozenset(
    {
        "asyncio",
        "concurrent",
        "multiprocessing",
        "socket",
        "subprocess",
        "threading",
        "time",
        "urllib",
        "http",
    }
)


@dataclass(frozen=True, slots=True)
class Import:
    importer: str  # "worker.engine.core"
    target: str  # "ellm.worker.api.errors", or "torch"
    line: int


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name below ellm, file) of every module of the top folders."""
    for top in TOP:
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(name: str, path: Path) -> Iterator[Import]:
    """Every import of one file, relative ones resolved, and import_module("...") with a literal."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join(["ellm", *above, *([node.module] if node.module else [])])
            for alias in node.names:  # `from ellm.worker import api` names a module only with its last part
                yield Import(name, f"{base}.{alias.name}", node.lineno)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(name, node.args[0].value, node.lineno)


def violations(root: Path) -> list[str]:
    """One line per import that breaks a rule: "worker.cache.x:12 imports ...: why"."""
    return [
        f"{found.importer}:{found.line} imports {found.target}: {why}"
        for name, path in modules(root)
        for found in imports(name, path)
        if (why := broken_rule(found)) is not None
    ]


def broken_rule(found: Import) -> str | None:
    top = found.target.split(".")[0]
    if top in TOP:
        return "a second copy of each class; import ellm." + found.target
    pure = _within(found.importer, PURE) and not _within(found.importer, BODIES)
    if top != "ellm":
        return _foreign(top) if pure else None
    target = found.target.removeprefix("ellm.")
    folder, other = found.importer.split(".")[0], target.split(".")[0]
    if folder != other:
        return None if _within(target, ALLOWED[folder]) else f"{folder} may not import it"
    if pure and not _within(target, PURE):
        return "a brain imports a body"
    if pure and _within(target, BODIES):
        return "a brain imports a body"
    if folder == "worker" and _rank(target) > _rank(found.importer):
        return "upwards inside worker"
    return None


def _foreign(top: str) -> str | None:
    if top not in sys.stdlib_module_names and top != "__future__":
        return "a brain imports the standard library only"
    return "a brain has no clock, no concurrency and no I/O" if top in NOT_PURE_STDLIB else None


def _within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _rank(name: str) -> int:
    return WORKER_RANK.get(name.split(".")[1], WORKER_TOP) if "." in name else WORKER_TOP
