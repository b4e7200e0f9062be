"""The configuration reference, docs/configuration.md, made from the tree itself.

    python -m ellm.deploy.reference           # writes the page

What a setting means is the comment beside its field, or stands in reference.yaml where the code needs none.
Types, defaults, bounds and short names are what the loader goes by. How the page begins is reference.txt.
"""

from __future__ import annotations

import ast
import inspect
import io
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from ellm.deploy import schema
from ellm.deploy.tree import ALIASES, BOUNDS, EllmConfig

TABLE = "| setting | | default | what it is |\n|---|---|---|---|\n"
PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
HEAD = Path(__file__).with_name("reference.txt")
MEANINGS = Path(__file__).with_name("reference.yaml")


def page() -> str:
    """The whole document."""
    parts = [HEAD.read_text()]
    short = {path: name for name, path in ALIASES.items()}
    for path, cls in sections(EllmConfig, ""):
        own = [leaf for leaf in leaves(cls, path)]
        if not own:
            continue
        parts.append(f"\n## {path.rstrip('.')}\n\n{_about(cls)}{TABLE}")
        parts += [_row(leaf, kind, default, text, short) for leaf, kind, default, text in own]
    return "".join(parts)


def sections(cls: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every dataclass of the tree with its path, outer ones first."""
    yield prefix, cls
    hints = get_type_hints(cls)
    for item in schema.fields_of(cls):
        if is_dataclass(hints[item.name]):
            yield from sections(hints[item.name], f"{prefix}{item.name}.")


def leaves(cls: Any, prefix: str) -> Iterator[tuple[str, Any, Any, str]]:
    """(path, annotation, default, comment) of the settings that stand in this class itself."""
    hints, comments = get_type_hints(cls), field_comments(cls)
    values = schema.unbuild(cls())
    for item in schema.fields_of(cls):
        if not is_dataclass(hints[item.name]):
            path = f"{prefix}{item.name}"
            text = comments.get(item.name) or meanings().get(path, "")
            yield path, hints[item.name], values[item.name], text.replace("None:", "null:")


@cache
def meanings() -> dict[str, str]:
    """Of settings whose fields have no comment, by path."""
    found: dict[str, str] = yaml.safe_load(MEANINGS.read_text())
    return found


def field_comments(cls: Any) -> dict[str, str]:
    """The comment on the line of each field, by its name."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {
        token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT
    }
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            lines = range(item.lineno, (item.end_lineno or item.lineno) + 1)
            found[item.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return found


def _about(cls: Any) -> str:
    text = inspect.cleandoc(cls.__doc__ or "")
    generated = text.startswith(f"{cls.__name__}(")  # the dataclass's own
    return "" if generated or not text else f"{text}\n\n"


def _row(path: str, kind: Any, default: Any, text: str, short: dict[str, str]) -> str:
    plain = list(default) if isinstance(default, tuple) else default
    shown = yaml.safe_dump(plain, default_flow_style=True).removesuffix("\n...\n").strip()
    name = f"`{path}`" + (f"<br>short: `{short[path]}`" if path in short else "")
    low, high = BOUNDS.get(path, (None, None))
    bounds = "" if low is None else f", {low:,} to {high:,}"
    cells = (name, f"{schema.describe(kind)}{bounds}", f"`{shown}`", text)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def main() -> int:
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
