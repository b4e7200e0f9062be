"""The text that the shipped model is trained on: documentation that the running Python carries.

Reads the `pydoc_data` topics, every docstring and every block comment of the standard library's sources (by
`ast` and by line, nothing is executed), and the docstrings of the modules written in C, which have no source.
Decides what is held out, by a hash of each text. Knows nothing of tokens, chat or models.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

STDLIB = Path(sysconfig.get_paths()["stdlib"])
HELD_OUT_PERCENT = 3
MIN_CHARS = 20
SKIPPED_FOLDERS = frozenset({"test", "tests", "idlelib", "site-packages", "lib2to3", "__pycache__"})
# C modules whose documentation is read from the interpreter; one that a build lacks is left out.
C_MODULES = (
    "builtins itertools math cmath time sys posix _io _struct _socket _ssl _functools _operator "
    "_collections _datetime _decimal _csv _bisect _heapq _random _json _pickle _hashlib _sqlite3 _thread "
    "_asyncio _codecs _elementtree _sre _weakref _signal _string _curses array select zlib _bz2 _lzma "
    "binascii fcntl mmap unicodedata atexit errno faulthandler gc grp pwd resource syslog termios "
    "readline marshal _imp _warnings _tracemalloc _locale"
)
# Names people use for modules that live under another.
PUBLIC_NAMES = {
    "posixpath": "os.path",
    "posix": "os",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "_collections_abc": "collections.abc",
    "_sre": "re",
    "_weakref": "weakref",
}


@dataclass(frozen=True, slots=True)
class Document:
    """One text with the name it documents; `kind` is topic, module, class, function, method or comment."""

    name: str
    kind: str
    text: str
    signature: str = ""

    @property
    def held_out(self) -> bool:
        """Whether this text is kept from training: a function of the text alone."""
        return int.from_bytes(hashlib.sha256(_key(self.text).encode()).digest()[:4]) % 100 < HELD_OUT_PERCENT


def _key(text: str) -> str:
    return " ".join(text.split()).lower()


def topics(stdlib: Path) -> Iterator[Document]:
    """Language reference sections, the ones behind `help("if")`."""
    for node in ast.walk(ast.parse((stdlib / "pydoc_data" / "topics.py").read_bytes())):
        if isinstance(node, ast.Dict):
            for name, text in sorted(ast.literal_eval(node).items()):
                yield Document(name, "topic", text.strip())


def source_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Dotted module name and path of every source file under `root`, sorted, tests left out."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts) and not parts[0].startswith("_sysconfigdata"):
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def docstrings(module: str, tree: ast.Module) -> Iterator[Document]:
    """Every docstring of one module in source order."""
    public = PUBLIC_NAMES.get(module, module.removeprefix("_"))

    def visit(node: ast.AST, name: str, kind: str) -> Iterator[Document]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield Document(name, kind, text.strip(), _signature(node))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from visit(child, f"{name}.{child.name}", "class")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = "method" if isinstance(node, ast.ClassDef) else "function"
                yield from visit(child, f"{name}.{child.name}", inner)
            elif isinstance(child, ast.If | ast.Try):
                yield from visit(child, name, kind)

    yield from visit(tree, public, "module")


def _signature(node: ast.AST) -> str:
    return f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""


def comments(module: str, source: str) -> Iterator[Document]:
    """Block comments of three lines or more that read as prose."""
    for match in re.finditer(r"(?:^[ \t]*#.*\n){3,}", source, re.MULTILINE):
        lines = [re.sub(r"^[ \t]*#+ ?", "", line).rstrip() for line in match.group().splitlines()]
        text = "\n".join(lines).strip("\n")
        prose = sum(c.isalpha() or c in " \n,." for c in text)
        if len(text) > 120 and prose > 0.93 * len(text) and text.count(" ") > len(text) / 12:
            yield Document(module, "comment", text)


def compiled_docstrings(module_name: str) -> Iterator[Document]:
    """Docstrings of one C module, its classes and their methods; nothing if this build lacks it."""
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        return
    public = PUBLIC_NAMES.get(module_name, module_name.removeprefix("_"))
    prefix = "" if module_name == "builtins" else f"{public}."
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or isinstance(value, ModuleType) or not callable(value):
            continue
        if getattr(value, "__module__", None) not in (module_name, public, None):
            continue
        kind = "class" if isinstance(value, type) else "function"
        yield from _described(prefix + name, kind, value)
        if isinstance(value, type):
            for attribute, member in sorted(vars(value).items()):
                if not attribute.startswith("_"):
                    yield from _described(f"{prefix}{name}.{attribute}", "method", member)


def _described(name: str, kind: str, value: object) -> Iterator[Document]:
    text = getattr(value, "__doc__", None)
    if isinstance(text, str) and text.strip() and type(value) not in (int, float, str, bytes, tuple):
        signature = getattr(value, "__text_signature__", None) or ""
        yield Document(name, kind, inspect.cleandoc(text), signature.replace("$", ""))


def all_documents(stdlib: Path = STDLIB) -> list[Document]:
    """Every text once (compared without regard to white space and case), in a fixed order."""
    found: list[Document] = list(topics(stdlib))
    for name in C_MODULES.split():
        found.extend(compiled_docstrings(name))
    for module, path in source_files(stdlib):
        source = path.read_text(encoding="utf-8", errors="replace")
        try:
            found.extend(docstrings(module, ast.parse(source)))
        except (SyntaxError, ValueError):
            continue
        found.extend(comments(module, source))
    unique: dict[str, Document] = {}
    for document in found:
        if len(document.text) >= MIN_CHARS:
            unique.setdefault(_key(document.text), document)
    return list(unique.values())


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held out); a held-out text loses the paragraphs that a training text has too."""
    training = [document for document in documents if not document.held_out]
    seen = {_key(paragraph) for document in training for paragraph in document.text.split("\n\n")}
    held_out = []
    for document in documents:
        if document.held_out:
            kept = [paragraph for paragraph in document.text.split("\n\n") if _key(paragraph) not in seen]
            if kept:
                held_out.append(Document(document.name, document.kind, "\n\n".join(kept), document.signature))
    return training, held_out
